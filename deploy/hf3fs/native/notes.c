/* How other processes find memory that the daemon of a mount has made: it has no name anywhere.
 *
 * A note lies where memory of our own would, is locked and swept like it, and says under which
 * descriptor of which process the memory can be opened (proc_pid_fd(5)), by the same user in the
 * same pid namespace. The memory's inode tells whether that is still it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemons.h"

#define NOTE_FORMAT "emberfs region %d %d %llu\n" /* process, descriptor, inode */
#define NOTE_BYTES 128

bool write_note(int fd, const struct shared_memory *memory) {
  char text[NOTE_BYTES];
  struct stat found;
  if (fstat(memory->region.fd, &found) != 0) return false;
  int length = snprintf(text, sizeof text, NOTE_FORMAT, (int)getpid(), memory->region.fd,
                        (unsigned long long)found.st_ino);
  return pwrite(fd, text, (size_t)length, 0) == length;
}

/* A stranger's note could lead to anything that we may open. */
static bool is_trusted(int fd) {
  struct stat found;
  return fstat(fd, &found) == 0 && (found.st_uid == geteuid() || found.st_uid == 0);
}

/* Nobody can make it smaller under who has it mapped. */
static bool is_region(int fd, unsigned long long inode) {
  struct stat found;
  int seals = fcntl(fd, F_GET_SEALS);
  return seals >= 0 && (seals & F_SEAL_SHRINK) && fstat(fd, &found) == 0 && found.st_ino == inode;
}

int open_noted(int note_fd) {
  char text[NOTE_BYTES], path[64];
  int process, descriptor;
  unsigned long long inode;
  if (!is_trusted(note_fd)) return -EPERM;
  ssize_t length = pread(note_fd, text, sizeof text - 1, 0);
  text[length > 0 ? length : 0] = 0;
  if (sscanf(text, NOTE_FORMAT, &process, &descriptor, &inode) != 3) return -EINVAL;
  snprintf(path, sizeof path, "/proc/%d/fd/%d", process, descriptor);
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return -errno;
  if (is_region(fd, inode)) return fd;
  close(fd);
  return -ENOENT; /* the process has ended, and its number is another's */
}
