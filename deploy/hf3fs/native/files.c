/* Registered descriptors, and what is done to files beside reading and writing. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemons.h"

#define RANGES_MAX 1000
#define PIECE_BYTES (1u << 20)

struct table {
  struct registered_file **rows; /* by number */
  int count;
};
static struct table by_fd, by_handle;
static struct registered_file *released;

static struct registered_file *look_up(const struct table *table, int number) {
  return number >= 0 && number < table->count ? table->rows[number] : NULL;
}

static bool make_room(struct table *table, int number) {
  if (number < table->count) return true;
  int count = (number | 63) + 1;
  struct registered_file **rows = realloc(table->rows, (size_t)count * sizeof *rows);
  if (!rows) return false;
  memset(rows + table->count, 0, (size_t)(count - table->count) * sizeof *rows);
  table->rows = rows;
  table->count = count;
  return true;
}

/* Programs hand in either the descriptor or what registering it returned, negative or positive. */
struct registered_file *find_file(int fd) {
  if (fd >= 0) {
    struct registered_file *file = look_up(&by_fd, fd);
    return file ? file : look_up(&by_handle, fd);
  }
  return fd > -INT_MAX ? look_up(&by_handle, -fd) : NULL;
}

void release_file(struct registered_file *file) {
  if (--file->references > 0) return;
  file->next = released;
  released = file;
}

struct registered_file *take_released(void) {
  struct registered_file *files = released;
  released = NULL;
  return files;
}

void close_files(struct registered_file *files) {
  for (struct registered_file *file = files, *next; file; file = next) {
    next = file->next;
    forget_file(file);
    if (file->io_fd != file->handle) close(file->io_fd);
    close(file->handle);
    free(file);
  }
}

static void forget(struct registered_file *file) {
  by_fd.rows[file->fd] = NULL;
  by_handle.rows[file->handle] = NULL;
  release_file(file);
}

/* pwrite(2) appends to a file that was opened with O_APPEND, whatever the offset says; an I/O of a
 * ring goes where it was told to. */
static int without_append(int handle, int flags) {
  char path[64];
  snprintf(path, sizeof path, "/proc/self/fd/%d", handle);
  return open(path, (flags & (O_ACCMODE | O_DIRECT | O_SYNC | O_DSYNC)) | O_CLOEXEC);
}

static int open_for_io(struct registered_file *file, int flags) {
  file->handle = fcntl(file->fd, F_DUPFD_CLOEXEC, 3);
  if (file->handle < 0) return errno;
  file->io_fd = file->handle;
  if ((flags & O_APPEND) && (flags & O_ACCMODE) != O_RDONLY) {
    file->io_fd = without_append(file->handle, flags);
    if (file->io_fd < 0) {
      int problem = errno;
      close(file->handle);
      return problem;
    }
  }
  return 0;
}

/* Somebody closed the number without saying so, and it has come back as another file. */
static bool is_stale(const struct registered_file *before, const struct registered_file *now) {
  struct statx one, other;
  int flags = AT_EMPTY_PATH | AT_STATX_DONT_SYNC;
  if (statx(before->handle, "", flags, STATX_INO, &one) != 0) return false;
  if (statx(now->handle, "", flags, STATX_INO, &other) != 0) return false;
  return one.stx_ino != other.stx_ino || one.stx_dev_major != other.stx_dev_major ||
         one.stx_dev_minor != other.stx_dev_minor;
}

static int note(struct registered_file *file) {
  lock_state();
  int problem = 0;
  struct registered_file *before = look_up(&by_fd, file->fd);
  if (before && is_stale(before, file)) {
    forget(before);
    before = NULL;
  }
  if (before) {
    problem = EINVAL;
  } else if (!make_room(&by_fd, file->fd) || !make_room(&by_handle, file->handle)) {
    problem = ENOMEM;
  } else {
    by_fd.rows[file->fd] = file;
    by_handle.rows[file->handle] = file;
  }
  unlock_state();
  return problem;
}

EXPORTED int hf3fs_reg_fd(int fd, uint64_t flags) {
  (void)flags;
  int opened_flags = fcntl(fd, F_GETFL);
  if (opened_flags < 0 || (opened_flags & O_PATH) || !is_served(fd)) return EBADF;
  struct registered_file *file = malloc(sizeof *file);
  if (!file) return ENOMEM;
  prepare_process();
  *file = (struct registered_file){
      .fd = fd,
      .access = opened_flags & O_ACCMODE,
      .synchronous = opened_flags & (O_SYNC | O_DSYNC),
      .references = 1};
  int problem = open_for_io(file, opened_flags);
  if (problem) {
    free(file);
    return problem;
  }
  int handle = file->handle;
  problem = note(file);
  if (!problem) return -handle;
  file->next = NULL;
  close_files(file);
  return problem;
}

EXPORTED void hf3fs_dereg_fd(int fd) {
  lock_state();
  struct registered_file *file = fd >= 0 ? look_up(&by_fd, fd) : find_file(fd);
  if (file) forget(file);
  unlock_state();
}

EXPORTED int hf3fs_hardlink(const char *target, const char *link_name) {
  if (!target || !link_name) return EINVAL;
  return link(target, link_name) == 0 ? 0 : errno;
}

static bool all_zeros(const char *bytes, size_t count) {
  return count == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, count - 1) == 0);
}

/* 0 when bytes [offset, offset + count) are written, else errno. */
static int write_fully(int fd, const char *bytes, size_t count, off_t offset) {
  while (count > 0) {
    ssize_t done = pwrite(fd, bytes, count, offset);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return errno;
    bytes += done, count -= (size_t)done, offset += done;
  }
  return 0;
}

/* Zeros only where there is something else: holes stay holes, and a file of terabytes that is
 * mostly empty is read, not filled. */
static int zero_range(int fd, bool readable, off_t start, off_t end) {
  char *bytes = malloc(2 * PIECE_BYTES);
  if (!bytes) return ENOMEM;
  char *zeros = bytes + PIECE_BYTES;
  memset(zeros, 0, PIECE_BYTES);
  int problem = 0;
  while (start < end && !problem) {
    size_t count = end - start < PIECE_BYTES ? (size_t)(end - start) : PIECE_BYTES;
    if (readable) {
      ssize_t got = pread(fd, bytes, count, start);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) problem = errno;
      if (got <= 0) break; /* cut meanwhile: nothing is left to empty */
      count = (size_t)got;
    }
    if (!readable || !all_zeros(bytes, count)) problem = write_fully(fd, zeros, count, start);
    start += (off_t)count;
  }
  free(bytes);
  return problem;
}

static int empty_range(int fd, int flags, size_t start, size_t end, off_t length) {
  if (end > (size_t)length) end = (size_t)length; /* a hole does not make a file grow */
  if (start >= end) return 0;
  if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start,
                (off_t)(end - start)) == 0)
    return 0;
  if (errno != EOPNOTSUPP && errno != ENOSYS) return errno;
  return zero_range(fd, (flags & O_ACCMODE) == O_RDWR, (off_t)start, (off_t)end);
}

EXPORTED int hf3fs_punchhole(int fd, int n, const size_t *start, const size_t *end, size_t flags) {
  (void)flags;
  if (n < 0 || n > RANGES_MAX || (n > 0 && (!start || !end))) return EINVAL;
  for (int i = 0; i < n; i++)
    if (start[i] > end[i]) return EINVAL;
  int opened_flags = fcntl(fd, F_GETFL);
  if (opened_flags < 0 || (opened_flags & O_ACCMODE) == O_RDONLY || !is_served(fd)) return EBADF;
  struct stat status;
  if (fstat(fd, &status) != 0) return errno;
  int io_fd = opened_flags & O_APPEND ? without_append(fd, opened_flags) : fd;
  if (io_fd < 0) return errno;
  int problem = 0;
  for (int i = 0; i < n && !problem; i++)
    problem = empty_range(io_fd, opened_flags, start[i], end[i], status.st_size);
  if (io_fd != fd) close(io_fd);
  return problem;
}
