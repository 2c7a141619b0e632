/* A program as users write it against hf3fs_usrbio.h; test_hf3fs.py compiles and runs it in an empty
 * directory of a mount: hf3fs_program DIRECTORY MOUNT_POINT. Every check says where it failed. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <hf3fs_usrbio.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifdef WITHOUT_THREADS /* a host that has no more: stands before the C library's */
#include <pthread.h>
int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                   void *argument) {
  (void)thread, (void)attributes, (void)start, (void)argument;
  return EAGAIN;
}
#endif

#define CHECK(is, wanted) check(__LINE__, #is, (long long)(is), (long long)(wanted))
#define BLOCK 65536
#define DEPTH 8

static const char *mount_point;

static void check(int line, const char *what, long long is, long long wanted) {
  if (is == wanted) return;
  fprintf(stderr, "line %d: %s is %lld, not %lld\n", line, what, is, wanted);
  exit(1);
}

static void fill(uint8_t *bytes, size_t count, unsigned seed) {
  for (size_t i = 0; i < count; i++) bytes[i] = (uint8_t)(seed = seed * 1103515245u + 12345u, seed >> 16);
}

static struct timespec in(double seconds) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  long long ns = now.tv_sec * 1000000000LL + now.tv_nsec + (long long)(seconds * 1e9);
  return (struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
}

static void one(struct hf3fs_ior *ior, struct hf3fs_iov *iov, bool read, int fd, size_t off,
                uint64_t length, int64_t wanted) {
  struct hf3fs_cqe cqe;
  int token = 0, index = hf3fs_prep_io(ior, iov, read, iov->base, fd, off, length, &token);
  CHECK(index >= 0, 1);
  CHECK(hf3fs_submit_ios(ior), 0);
  CHECK(hf3fs_wait_for_ios(ior, &cqe, 1, 1, NULL), 1);
  CHECK(cqe.result, wanted);
  CHECK(cqe.index, index);
  CHECK(cqe.reserved, 0);
  CHECK(cqe.userdata == &token, 1);
}

static void mounts(const char *directory) {
  char found[256] = "untouched";
  int length = (int)strlen(mount_point) + 1;
  CHECK(hf3fs_extract_mount_point(found, sizeof found, directory), length);
  CHECK(strcmp(found, mount_point), 0);
  CHECK(hf3fs_extract_mount_point(found, sizeof found, mount_point), length);
  strcpy(found, "untouched");
  CHECK(hf3fs_extract_mount_point(found, length - 1, directory), length);
  CHECK(strcmp(found, "untouched"), 0);
  CHECK(hf3fs_extract_mount_point(found, sizeof found, "/proc"), -1);
  CHECK(hf3fs_extract_mount_point(found, sizeof found, "/nonexistent"), -1);
  CHECK(hf3fs_extract_mount_point(found, sizeof found, NULL), -1);
}

static void registering(int fd) {
  int handle = hf3fs_reg_fd(fd, 0);
  CHECK(handle < 0, 1);
  CHECK(hf3fs_reg_fd(fd, 0), EINVAL);
  CHECK(hf3fs_is_hf3fs(fd), 1);
  CHECK(hf3fs_reg_fd(9999, 0), EBADF);
  CHECK(hf3fs_reg_fd(-5, 0), EBADF);
  int other = open("/dev/null", O_RDWR);
  CHECK(hf3fs_is_hf3fs(other), 0);
  CHECK(hf3fs_reg_fd(other, 0), EBADF);
  close(other);
  hf3fs_dereg_fd(1234567);
  hf3fs_dereg_fd(fd);
  CHECK(fcntl(-handle, F_GETFD), -1); /* the duplicate is closed */
  hf3fs_dereg_fd(fd);
}

/* A number that was closed while it was registered, and came back as another file. */
static void forgotten(const char *path) {
  char other[5000];
  snprintf(other, sizeof other, "%s.other", path);
  int fd = open(path, O_RDWR);
  CHECK(hf3fs_reg_fd(fd, 0) < 0, 1);
  CHECK(close(fd), 0);
  CHECK(open(path, O_RDWR), fd);
  CHECK(hf3fs_reg_fd(fd, 0), EINVAL); /* the same file: still registered */
  CHECK(close(fd), 0);
  CHECK(open(other, O_RDWR | O_CREAT, 0600), fd);
  int handle = hf3fs_reg_fd(fd, 0);
  CHECK(handle < 0, 1);
  struct stat one, two;
  CHECK(fstat(fd, &one) || fstat(-handle, &two), 0);
  CHECK(one.st_ino == two.st_ino, 1);
  hf3fs_dereg_fd(handle); /* by its second name */
  CHECK(hf3fs_reg_fd(fd, 0) < 0, 1);
  hf3fs_dereg_fd(fd);
  close(fd), unlink(other);
}

static void refusals(int fd, const char *path) {
  struct hf3fs_iov iov;
  struct hf3fs_ior reading, writing;
  struct hf3fs_cqe cqe;
  CHECK(hf3fs_iovcreate(&iov, mount_point, BLOCK, 0, -1), 0);
  CHECK(hf3fs_iorcreate(&reading, mount_point, 2, true, 0, -1), 0);
  CHECK(hf3fs_iorcreate(&writing, mount_point, 2, false, 0, -1), 0);
  CHECK(hf3fs_prep_io(&reading, &iov, true, iov.base, fd, 0, 1, NULL), -EBADF);
  CHECK(hf3fs_reg_fd(fd, 0) < 0, 1);
  CHECK(hf3fs_prep_io(&reading, &iov, false, iov.base, fd, 0, 1, NULL), -EINVAL);
  CHECK(hf3fs_prep_io(&writing, &iov, true, iov.base, fd, 0, 1, NULL), -EINVAL);
  CHECK(hf3fs_prep_io(&reading, &iov, true, iov.base, fd, 0, 0, NULL), -EINVAL);
  CHECK(hf3fs_prep_io(&reading, &iov, true, NULL, fd, 0, 1, NULL), -EINVAL);
  CHECK(hf3fs_prep_io(NULL, &iov, true, iov.base, fd, 0, 1, NULL), -EINVAL);
  CHECK(hf3fs_prep_io(&reading, NULL, true, iov.base, fd, 0, 1, NULL), -EINVAL);
  CHECK(hf3fs_prep_io(&reading, &iov, true, iov.base - 1, fd, 0, 1, NULL), -EINVAL);
  CHECK(hf3fs_prep_io(&reading, &iov, true, iov.base + 1, fd, 0, BLOCK, NULL), -EINVAL);
  CHECK(hf3fs_prep_io(&reading, &iov, true, iov.base, fd, 0, BLOCK + 1, NULL), -EINVAL);
  CHECK(hf3fs_prep_io(&reading, &iov, true, iov.base, fd, (size_t)1 << 63, 1, NULL), -EINVAL);
  CHECK(hf3fs_prep_io(&reading, &iov, true, iov.base + 1, fd, 0, UINT64_MAX, NULL), -EINVAL);
  CHECK(hf3fs_wait_for_ios(&reading, &cqe, 0, 0, NULL), -EINVAL);
  CHECK(hf3fs_wait_for_ios(&reading, &cqe, -1, 0, NULL), -EINVAL);
  CHECK(hf3fs_wait_for_ios(&reading, &cqe, 1, 0, NULL), 0);
  CHECK(hf3fs_io_entries(&reading), 2);
  int read_only = open(path, O_RDONLY), write_only = open(path, O_WRONLY);
  CHECK(hf3fs_reg_fd(read_only, 0) < 0, 1);
  CHECK(hf3fs_reg_fd(write_only, 0) < 0, 1);
  CHECK(hf3fs_prep_io(&writing, &iov, false, iov.base, read_only, 0, 1, NULL), -EACCES);
  CHECK(hf3fs_prep_io(&reading, &iov, true, iov.base, write_only, 0, 1, NULL), -EACCES);
  for (int i = 0; i < 2; i++)
    CHECK(hf3fs_prep_io(&reading, &iov, true, iov.base, fd, 0, 1, NULL) >= 0, 1);
  CHECK(hf3fs_prep_io(&reading, &iov, true, iov.base, fd, 0, 1, NULL), -EAGAIN);
  hf3fs_dereg_fd(read_only), hf3fs_dereg_fd(write_only), hf3fs_dereg_fd(fd);
  close(read_only), close(write_only);
  hf3fs_iordestroy(&reading), hf3fs_iordestroy(&writing);
  CHECK(reading.iorh == NULL, 1);
  hf3fs_iordestroy(&reading);
  hf3fs_iovdestroy(&iov);
  CHECK(iov.iovh == NULL, 1);
  hf3fs_iovdestroy(&iov);
}

static void creating(void) {
  struct hf3fs_iov iov;
  struct hf3fs_ior ior;
  char longest[400];
  memset(longest, 'x', sizeof longest - 1), longest[0] = '/', longest[399] = 0;
  CHECK(hf3fs_iovcreate(NULL, mount_point, BLOCK, 0, -1), -EINVAL);
  CHECK(hf3fs_iovcreate(&iov, longest, BLOCK, 0, -1), -EINVAL);
  CHECK(hf3fs_iovcreate(&iov, "/nonexistent", BLOCK, 0, -1), -ENOENT);
  CHECK(hf3fs_iovcreate(&iov, "/proc", BLOCK, 0, -1), -ENOENT);
  CHECK(hf3fs_iovcreate(&iov, mount_point, (size_t)1 << 50, 0, -1), -EIO);
  CHECK(hf3fs_iorcreate(NULL, mount_point, 1, true, 0, -1), -EINVAL);
  CHECK(hf3fs_iorcreate(&ior, "", 1, true, 0, -1), -EINVAL);
  CHECK(hf3fs_iorcreate(&ior, NULL, 1, true, 0, -1), -EINVAL);
  CHECK(hf3fs_iorcreate3(&ior, mount_point, 1, true, 0, 0, -1, -1), -EINVAL);
  CHECK(hf3fs_iorcreate4(&ior, mount_point, 1, true, 0, 0, -1, HF3FS_IOR_FORBID_READ_HOLES),
        -ENOTSUP);
  CHECK(hf3fs_iorcreate4(&ior, mount_point, 1, true, 0, 0, -1, 64), -EINVAL);
  for (int priority = -1; priority <= 1; priority++) {
    CHECK(hf3fs_iorcreate3(&ior, mount_point, 4, true, 4, priority, 10, 0), 0);
    CHECK(ior.priority, priority);
    CHECK(ior.for_read && ior.iorh && ior.io_depth == 4 && ior.timeout == 10, 1);
    hf3fs_iordestroy(&ior);
  }
}

static void sharing(void) {
  struct hf3fs_iov mine, theirs;
  uint8_t id[16];
  CHECK(hf3fs_iovcreate(&mine, mount_point, BLOCK, BLOCK / 2, -1), 0);
  memcpy(id, mine.id, sizeof id);
  CHECK(mine.size, BLOCK);
  CHECK(hf3fs_iovopen(&theirs, id, mount_point, BLOCK, 0, -1), -ENOENT); /* other block size */
  CHECK(hf3fs_iovopen(&theirs, id, mount_point, 2 * BLOCK, BLOCK / 2, -1), -EINVAL);
  pid_t child = fork();
  if (child == 0) {
    CHECK(hf3fs_iovopen(&theirs, id, mount_point, BLOCK, BLOCK / 2, -1), 0);
    CHECK(theirs.base != mine.base, 1);
    memcpy(theirs.base, "hello", 6);
    hf3fs_iovdestroy(&theirs);
    hf3fs_iovdestroy(&mine); /* a child's destroying takes no name away */
    _exit(0);
  }
  int status;
  waitpid(child, &status, 0);
  CHECK(status, 0);
  CHECK(strcmp((char *)mine.base, "hello"), 0);
  CHECK(hf3fs_iovopen(&theirs, id, mount_point, BLOCK, BLOCK / 2, -1), 0);
  hf3fs_iovunlink(&mine), hf3fs_iovunlink(&mine);
  CHECK(strcmp((char *)theirs.base, "hello"), 0);
  hf3fs_iovdestroy(&theirs);
  CHECK(hf3fs_iovopen(&theirs, id, mount_point, BLOCK, BLOCK / 2, -1), -ENOENT);
  hf3fs_iovdestroy(&mine);
}

/* Unaligned pieces, both handles, short reads, zeros in holes. */
static void contents(int fd) {
  struct hf3fs_iov iov;
  struct hf3fs_ior reading, writing;
  uint8_t *copy = malloc(BLOCK);
  int handle = hf3fs_reg_fd(fd, 0);
  CHECK(hf3fs_iovcreate(&iov, mount_point, BLOCK, 0, -1), 0);
  CHECK(hf3fs_iorcreate2(&reading, mount_point, DEPTH, true, 0, 1, -1), 0);
  CHECK(hf3fs_iorcreate4(&writing, mount_point, DEPTH, false, 0, 200, -1, 0), 0);
  fill(iov.base, BLOCK, 7), memcpy(copy, iov.base, BLOCK);
  one(&writing, &iov, false, fd, 3, 28, 28);
  one(&writing, &iov, false, handle, 31, BLOCK, BLOCK);
  one(&reading, &iov, true, -handle, 31, BLOCK, BLOCK);
  CHECK(memcmp(copy, iov.base, BLOCK), 0);
  one(&reading, &iov, true, fd, 0, 31, 31);
  CHECK(memcmp(iov.base, "\0\0\0", 3) || memcmp(iov.base + 3, copy, 28), 0);
  one(&reading, &iov, true, fd, BLOCK, BLOCK, 31); /* the end of the file */
  one(&reading, &iov, true, fd, BLOCK + 31, BLOCK, 0);
  one(&reading, &iov, true, fd, (size_t)1 << 40, BLOCK, 0);
  CHECK(ftruncate(fd, 4 * BLOCK), 0);
  memset(iov.base, 1, BLOCK);
  one(&reading, &iov, true, fd, 3 * BLOCK, BLOCK, BLOCK);
  CHECK(iov.base[0] || memcmp(iov.base, iov.base + 1, BLOCK - 1), 0);
  hf3fs_dereg_fd(fd);
  hf3fs_iordestroy(&reading), hf3fs_iordestroy(&writing), hf3fs_iovdestroy(&iov);
  free(copy);
}

static void appending(const char *path) {
  struct hf3fs_iov iov;
  struct hf3fs_ior ior;
  char found[4];
  int fd = open(path, O_RDWR | O_APPEND);
  CHECK(hf3fs_iovcreate(&iov, mount_point, BLOCK, 0, -1), 0);
  CHECK(hf3fs_iorcreate(&ior, mount_point, 1, false, 0, -1), 0);
  CHECK(hf3fs_reg_fd(fd, 0) < 0, 1);
  memcpy(iov.base, "here", 4);
  one(&ior, &iov, false, fd, 100, 4, 4);
  CHECK(pread(fd, found, 4, 100), 4);
  CHECK(memcmp(found, "here", 4), 0);
  hf3fs_dereg_fd(fd), close(fd);
  hf3fs_iordestroy(&ior), hf3fs_iovdestroy(&iov);
}

/* What fails midway is an error: a short count would look like the end of the file. */
static void failing(int fd) {
  uint8_t id[16] = {9};
  struct hf3fs_iov iov;
  struct hf3fs_ior reading, writing;
  uint8_t *memory = mmap(NULL, 2 * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(mprotect(memory + BLOCK, BLOCK, PROT_NONE), 0);
  CHECK(hf3fs_iovwrap(&iov, memory, id, mount_point, 2 * BLOCK, 0, -1), 0);
  CHECK(hf3fs_iorcreate(&reading, mount_point, 1, true, 0, -1), 0);
  CHECK(hf3fs_iorcreate(&writing, mount_point, 1, false, 0, -1), 0);
  CHECK(hf3fs_reg_fd(fd, 0) < 0, 1);
  one(&reading, &iov, true, fd, 0, 2 * BLOCK, -EFAULT);
  one(&writing, &iov, false, fd, 0, 2 * BLOCK, -EFAULT);
  one(&reading, &iov, true, fd, 0, BLOCK, BLOCK);
  hf3fs_dereg_fd(fd);
  hf3fs_iordestroy(&reading), hf3fs_iordestroy(&writing);
  munmap(memory, 2 * BLOCK);
}

/* Several in flight; times that are over; a handle that is posted again. */
static void waiting(int fd) {
  uint8_t id[16] = {1, 2, 3};
  struct hf3fs_iov iov;
  struct hf3fs_ior ior;
  struct hf3fs_cqe cqes[1024];
  void *memory = mmap(NULL, DEPTH * BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(hf3fs_iovwrap(&iov, memory, id, mount_point, DEPTH * BLOCK, BLOCK, -1), 0);
  CHECK(iov.iovh == NULL && iov.base == memory, 1);
  CHECK(hf3fs_iorcreate(&ior, mount_point, DEPTH, true, 0, -1), 0);
  CHECK(hf3fs_reg_fd(fd, 0) < 0, 1);
  struct timespec over[] = {in(-1000), {0, 0}, {-5, 0}, {5, 2000000000}};
  struct timespec start = in(0), soon = in(0.05);
  soon.tv_sec -= 3, soon.tv_nsec += 3000000000; /* a sum that was not carried */
  for (int i = 0; i < 4; i++) CHECK(hf3fs_wait_for_ios(&ior, cqes, 1024, 1, &over[i]), 0);
  CHECK(hf3fs_wait_for_ios(&ior, cqes, 1024, 1, &soon), 0);
  struct timespec end = in(0);
  double waited = (double)(end.tv_sec - start.tv_sec) + (double)(end.tv_nsec - start.tv_nsec) / 1e9;
  CHECK(waited > 0.045 && waited < 5, 1);
  for (int posted = 0; posted < 50; posted++) {
    uint8_t seen[DEPTH] = {0};
    for (intptr_t i = 0; i < DEPTH; i++) {
      int index = hf3fs_prep_io(&ior, &iov, true, iov.base + i * BLOCK, fd, 0, BLOCK, (void *)i);
      CHECK(index >= 0 && index < DEPTH, 1);
    }
    CHECK(hf3fs_submit_ios(&ior), 0);
    for (int done = 0; done < DEPTH;) {
      int count = hf3fs_wait_for_ios(&ior, cqes, 1024, 1, &over[posted % 4]); /* busy, as some do */
      CHECK(count >= 0, 1);
      for (int i = 0; i < count; i++) seen[(intptr_t)cqes[i].userdata]++;
      done += count;
    }
    for (int i = 0; i < DEPTH; i++) CHECK(seen[i], 1);
  }
  for (int i = 0; i < 5; i++)
    CHECK(hf3fs_prep_io(&ior, &iov, true, iov.base + i * BLOCK, fd, 0, BLOCK, NULL) >= 0, 1);
  CHECK(hf3fs_wait_for_ios(&ior, cqes, 3, 9, NULL), 3); /* never submitted; more asked than room */
  struct timespec later = in(30);
  CHECK(hf3fs_wait_for_ios(&ior, cqes, 3, 2, &later), 2);
  for (int i = 0; i < DEPTH; i++)
    CHECK(hf3fs_prep_io(&ior, &iov, true, iov.base + i * BLOCK, fd, 0, BLOCK, NULL) >= 0, 1);
  CHECK(hf3fs_submit_ios(&ior), 0);
  hf3fs_dereg_fd(fd);
  hf3fs_iordestroy(&ior); /* while they are under way */
  hf3fs_iovdestroy(&iov);
  CHECK(iov.base == memory, 1); /* a wrapped buffer is the caller's */
  munmap(memory, DEPTH * BLOCK);
}

/* A child finds empty rings that work, while the parent's I/O goes on. */
static void forking(int fd) {
  struct hf3fs_iov iov;
  struct hf3fs_ior ior;
  struct hf3fs_cqe cqes[DEPTH];
  CHECK(hf3fs_iovcreate(&iov, mount_point, DEPTH * BLOCK, 0, -1), 0);
  CHECK(hf3fs_iorcreate(&ior, mount_point, DEPTH, true, 0, -1), 0);
  CHECK(hf3fs_reg_fd(fd, 0) < 0, 1);
  for (int round = 0; round < 20; round++) {
    for (int i = 0; i < DEPTH; i++)
      CHECK(hf3fs_prep_io(&ior, &iov, true, iov.base + i * BLOCK, fd, 0, BLOCK, NULL) >= 0, 1);
    CHECK(hf3fs_submit_ios(&ior), 0);
    pid_t child = fork();
    if (child == 0) {
      alarm(60);
      CHECK(hf3fs_wait_for_ios(&ior, cqes, DEPTH, 0, NULL), 0);
      for (int i = 0; i < DEPTH; i++)
        CHECK(hf3fs_prep_io(&ior, &iov, true, iov.base + i * BLOCK, fd, 0, BLOCK, NULL) >= 0, 1);
      CHECK(hf3fs_submit_ios(&ior), 0);
      CHECK(hf3fs_wait_for_ios(&ior, cqes, DEPTH, DEPTH, NULL), DEPTH);
      hf3fs_iordestroy(&ior);
      hf3fs_dereg_fd(fd);
      _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    CHECK(status, 0);
    CHECK(hf3fs_wait_for_ios(&ior, cqes, DEPTH, DEPTH, NULL), DEPTH);
    for (int i = 0; i < DEPTH; i++) CHECK(cqes[i].result, BLOCK);
  }
  hf3fs_dereg_fd(fd);
  hf3fs_iordestroy(&ior), hf3fs_iovdestroy(&iov);
}

static void names(const char *path) {
  char second[5000];
  struct stat status;
  snprintf(second, sizeof second, "%s.second", path);
  CHECK(hf3fs_hardlink(path, second), 0);
  CHECK(hf3fs_hardlink(path, second), EEXIST);
  CHECK(hf3fs_hardlink("/nonexistent", second), ENOENT);
  CHECK(stat(path, &status), 0);
  CHECK(status.st_nlink, 2);
}

static void holes(const char *path, int fd) {
  static uint8_t before[4 * BLOCK], after[4 * BLOCK];
  size_t start[] = {10, 2 * BLOCK}, end[] = {20, 9 * BLOCK}, backwards[] = {5, 0};
  fill(before, sizeof before, 3);
  CHECK(pwrite(fd, before, sizeof before, 0), sizeof before);
  CHECK(hf3fs_punchhole(fd, 2, start, end, 0), 0);
  CHECK(hf3fs_punchhole(fd, 0, NULL, NULL, 0), 0);
  memset(before + 10, 0, 10), memset(before + 2 * BLOCK, 0, 2 * BLOCK);
  CHECK(pread(fd, after, sizeof after, 0), sizeof after);
  CHECK(memcmp(before, after, sizeof after), 0);
  struct stat status;
  CHECK(fstat(fd, &status), 0);
  CHECK(status.st_size, 4 * BLOCK);
  CHECK(hf3fs_punchhole(fd, 1001, start, end, 0), EINVAL);
  CHECK(hf3fs_punchhole(fd, -1, start, end, 0), EINVAL);
  CHECK(hf3fs_punchhole(fd, 1, end, backwards, 0), EINVAL);
  CHECK(hf3fs_punchhole(-1, 1, start, end, 0), EBADF);
  int read_only = open(path, O_RDONLY);
  CHECK(hf3fs_punchhole(read_only, 1, start, end, 0), EBADF);
  close(read_only);
  int write_only = open(path, O_WRONLY | O_APPEND);
  CHECK(hf3fs_punchhole(write_only, 2, start, end, 0), 0);
  CHECK(fstat(write_only, &status), 0);
  CHECK(status.st_size, 4 * BLOCK);
  close(write_only);
}

static void gpus(void) {
  struct hf3fs_iov iov = {.base = NULL};
  uint8_t id[16] = {0};
  CHECK(hf3fs_gdr_available(), 0);
  CHECK(hf3fs_gdr_device_count(), 0);
  CHECK(hf3fs_iovcreate_device(&iov, mount_point, BLOCK, 0, 0), -ENOTSUP);
  CHECK(hf3fs_iovopen_device(&iov, id, mount_point, BLOCK, 0, 0), -ENOTSUP);
  CHECK(hf3fs_iovwrap_device(&iov, id, id, mount_point, BLOCK, 0, 0), -ENOTSUP);
  CHECK(hf3fs_iov_mem_type(&iov), HF3FS_MEM_HOST);
  CHECK(hf3fs_iov_device_id(&iov), -1);
  CHECK(hf3fs_iovsync(&iov, 0), 0);
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  alarm(120); /* nothing here takes seconds; a hang is a failure */
  char path[4096];
  snprintf(path, sizeof path, "%s/file", argv[1]);
  mount_point = argv[2];
  int fd = open(path, O_RDWR | O_CREAT, 0644);
  CHECK(fd >= 0, 1);
  mounts(argv[1]);
  registering(fd);
  forgotten(path);
  creating();
  refusals(fd, path);
  sharing();
  contents(fd);
  appending(path);
  failing(fd);
  waiting(fd);
  forking(fd);
  names(path);
  holes(path, fd);
  gpus();
  CHECK(close(fd), 0);
  puts("all is as documented");
  return 0;
}
