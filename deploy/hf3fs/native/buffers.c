/* Buffers ("iov"): shared memory that has an id, under which other processes find it. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemons.h"

#define MEMORY_DIRECTORY "/dev/shm"
#define MEMORY_PREFIX "emberfs-iov-"
#define NOTE_SUFFIX ".region" /* a note, see notes.c, in place of the memory */
#define ATTEMPTS 16
#define RESERVE_ATTEMPTS 1000

struct buffer {
  bool owner;
  pid_t pid;   /* a forked child does not take the parent's names away */
  int lock_fd; /* its shared lock says that somebody lives who uses the memory */
  struct shared_memory *shared; /* NULL: the memory is a file of ours */
  char memory[sizeof MEMORY_DIRECTORY + sizeof MEMORY_PREFIX + UUID_TEXT_BYTES +
              sizeof NOTE_SUFFIX];
  char link[PATH_MAX];
};

static bool sound(const struct hf3fs_iov *iov, const char *mount_point, size_t size) {
  return iov && mount_point && *mount_point && strlen(mount_point) < HF3FS_PATH_MAX && size > 0;
}

static void describe(struct hf3fs_iov *iov, void *base, const uint8_t id[16],
                     const char *mount_point, size_t size, size_t block_size, int numa) {
  memset(iov, 0, sizeof *iov);
  iov->base = base;
  memcpy(iov->id, id, sizeof iov->id);
  strcpy(iov->mount_point, mount_point);
  iov->size = size;
  iov->block_size = block_size;
  iov->numa = numa;
}

/* Where the link of an id is; 0 or -errno. */
static int link_path(const char *mount_point, const uint8_t id[16], size_t block_size, bool make,
                     char path[PATH_MAX]) {
  char directory[PATH_MAX - 64], text[UUID_TEXT_BYTES], block[32] = "";
  int problem = link_directory(mount_point, make, directory, sizeof directory);
  if (problem) return problem;
  format_uuid(id, text);
  if (block_size) snprintf(block, sizeof block, ".b%zu", block_size);
  snprintf(path, PATH_MAX, "%s/%s%s", directory, text, block);
  return 0;
}

/* Remove what processes that were killed have left behind: memory that nobody has locked. */
static void sweep(void) {
  DIR *directory = opendir(MEMORY_DIRECTORY);
  if (!directory) return;
  for (struct dirent *entry; (entry = readdir(directory));) {
    if (strncmp(entry->d_name, MEMORY_PREFIX, strlen(MEMORY_PREFIX)) != 0) continue;
    int fd = openat(dirfd(directory), entry->d_name, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
    struct stat found;
    if (fd < 0) continue;
    if (fstat(fd, &found) == 0 && found.st_uid == geteuid() && flock(fd, LOCK_EX | LOCK_NB) == 0)
      unlinkat(dirfd(directory), entry->d_name, 0);
    close(fd);
  }
  closedir(directory);
}

/* Links in the user's own directory whose memory has gone. */
static void sweep_links(void) {
  char path[64], target[PATH_MAX];
  struct stat found;
  snprintf(path, sizeof path, MEMORY_DIRECTORY "/emberfs-hf3fs-%u", (unsigned)geteuid());
  DIR *directory = opendir(path);
  if (!directory) return;
  for (struct dirent *entry; (entry = readdir(directory));) {
    ssize_t length = readlinkat(dirfd(directory), entry->d_name, target, sizeof target - 1);
    if (length <= 0) continue;
    target[length] = 0;
    if (strstr(target, "/" MEMORY_PREFIX) && stat(target, &found) != 0 && errno == ENOENT)
      unlinkat(dirfd(directory), entry->d_name, 0);
  }
  closedir(directory);
}

static void sweep_all(void) {
  sweep();
  sweep_links();
}

static bool reserve(int fd, size_t size) {
  if (size > INT64_MAX) return false;
  for (int attempt = 0; attempt < RESERVE_ATTEMPTS; attempt++) {
    int problem = posix_fallocate(fd, 0, (off_t)size);
    if (problem != EINTR) return problem == 0; /* a program with timers has signals all the time */
  }
  return false;
}

/* Returns the descriptor of fresh memory of that size, or of a note of shared memory, locked; or
 * -errno. All of it is reserved now: /dev/shm may be small, and who touched what is not there would
 * be killed. */
static int make_memory(struct buffer *buffer, uint8_t id[16], size_t size) {
  char text[UUID_TEXT_BYTES];
  for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
    struct stat made;
    make_uuid(id);
    format_uuid(id, text);
    snprintf(buffer->memory, sizeof buffer->memory, MEMORY_DIRECTORY "/" MEMORY_PREFIX "%s%s", text,
             buffer->shared ? NOTE_SUFFIX : "");
    int fd = open(buffer->memory, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0 && errno == EEXIST) continue;
    if (fd < 0) return -EIO;
    /* Somebody's sweep may have come between: then the name is gone, and we take another. */
    bool ours = flock(fd, LOCK_SH | LOCK_NB) == 0 && fstat(fd, &made) == 0 && made.st_nlink > 0;
    if (ours && (buffer->shared ? write_note(fd, buffer->shared) : reserve(fd, size))) return fd;
    if (ours) unlink(buffer->memory);
    close(fd);
    if (ours) return -EIO;
  }
  return -EIO;
}

/* Map, unless a daemon's memory is mapped already, and note; closes lock_fd on failure. */
static int finish(struct hf3fs_iov *iov, struct buffer *buffer, int lock_fd, int memory_fd,
                  size_t size) {
  void *base = buffer->shared
                   ? buffer->shared->region.base
                   : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
  if (base == MAP_FAILED) {
    close(lock_fd);
    return -EIO;
  }
  buffer->lock_fd = lock_fd;
  buffer->pid = getpid();
  iov->base = base;
  iov->iovh = buffer;
  return 0;
}

static int create(struct hf3fs_iov *iov, struct buffer *buffer, const char *mount_point,
                  size_t size, size_t block_size, int numa) {
  uint8_t id[16];
  int fd = make_memory(buffer, id, size);
  if (fd < 0) return fd;
  int problem = link_path(mount_point, id, block_size, true, buffer->link);
  if (!problem && symlink(buffer->memory, buffer->link) != 0) problem = -errno;
  if (problem) {
    close(fd);
    unlink(buffer->memory);
    return problem;
  }
  describe(iov, NULL, id, mount_point, size, block_size, numa);
  buffer->owner = true;
  problem = finish(iov, buffer, fd, fd, size);
  if (problem) {
    unlink(buffer->link);
    unlink(buffer->memory);
  }
  return problem;
}

EXPORTED int hf3fs_iovcreate(struct hf3fs_iov *iov, const char *mount_point, size_t size,
                             size_t block_size, int numa) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  if (!sound(iov, mount_point, size) || block_size > size) return -EINVAL;
  pthread_once(&once, sweep_all);
  struct buffer *buffer = calloc(1, sizeof *buffer);
  if (!buffer) return -ENOMEM;
  buffer->shared = share_memory(mount_point, size);
  int problem = create(iov, buffer, mount_point, size, block_size, numa);
  if (problem && buffer->shared) unshare_memory(buffer->shared);
  if (problem) free(buffer);
  return problem;
}

static bool is_note(const char *path) {
  size_t length = strlen(path), suffix = strlen(NOTE_SUFFIX);
  return length > suffix && strcmp(path + length - suffix, NOTE_SUFFIX) == 0;
}

/* Map what somebody else has made; lock_fd is the buffer's. */
static int open_memory(struct hf3fs_iov *iov, int lock_fd, int memory_fd, size_t size) {
  struct stat found;
  if (fstat(memory_fd, &found) != 0 || !S_ISREG(found.st_mode) || (uint64_t)found.st_size < size) {
    close(lock_fd);
    return -EINVAL;
  }
  struct buffer *buffer = calloc(1, sizeof *buffer);
  if (!buffer) {
    close(lock_fd);
    return -ENOMEM;
  }
  int problem = finish(iov, buffer, lock_fd, memory_fd, size);
  if (problem) free(buffer);
  return problem;
}

EXPORTED int hf3fs_iovopen(struct hf3fs_iov *iov, const uint8_t id[16], const char *mount_point,
                           size_t size, size_t block_size, int numa) {
  char link[PATH_MAX], memory[PATH_MAX];
  if (!sound(iov, mount_point, size) || !id) return -EINVAL;
  int problem = link_path(mount_point, id, block_size, false, link);
  if (problem) return problem;
  if (!realpath(link, memory)) return -errno;
  if (strncmp(memory, MEMORY_DIRECTORY "/", sizeof MEMORY_DIRECTORY) != 0) return -EINVAL;
  int fd = open(memory, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return -errno;
  flock(fd, LOCK_SH | LOCK_NB); /* in use: a sweep leaves it alone */
  int memory_fd = is_note(memory) ? open_noted(fd) : fd;
  if (memory_fd < 0) close(fd);
  problem = memory_fd < 0 ? memory_fd : open_memory(iov, fd, memory_fd, size);
  if (memory_fd >= 0 && memory_fd != fd) close(memory_fd);
  if (problem) return problem;
  struct buffer *buffer = iov->iovh;
  void *base = iov->base;
  describe(iov, base, id, mount_point, size, block_size, numa);
  iov->iovh = buffer;
  return 0;
}

EXPORTED int hf3fs_iovwrap(struct hf3fs_iov *iov, void *base, const uint8_t id[16],
                           const char *mount_point, size_t size, size_t block_size, int numa) {
  if (!sound(iov, mount_point, size) || !base || !id) return -EINVAL;
  describe(iov, base, id, mount_point, size, block_size, numa);
  return 0;
}

static bool owns_names(const struct buffer *buffer) {
  return buffer->owner && buffer->pid == getpid();
}

EXPORTED void hf3fs_iovunlink(struct hf3fs_iov *iov) {
  struct buffer *buffer = iov ? iov->iovh : NULL;
  if (buffer && owns_names(buffer)) unlink(buffer->memory);
}

EXPORTED void hf3fs_iovdestroy(struct hf3fs_iov *iov) {
  struct buffer *buffer = iov ? iov->iovh : NULL;
  if (!buffer) return;
  if (owns_names(buffer)) {
    unlink(buffer->link);
    unlink(buffer->memory);
  }
  if (buffer->shared)
    unshare_memory(buffer->shared);
  else
    munmap(iov->base, iov->size);
  close(buffer->lock_fd);
  free(buffer);
  iov->base = NULL;
  iov->iovh = NULL;
}
