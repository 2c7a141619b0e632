/* The call sequences of two C programs, run by test_hf3fs_clients.py on a mount:
 *   hf3fs_posted transfer DIRECTORY MOUNT_POINT   memory of the application's that is made shared
 *       under it, a ring per transfer that is posted again, deadlines taken from the wrong clock
 *   hf3fs_posted benchmark DIRECTORY MOUNT_POINT  forked workers, two rings that nobody destroys,
 *       buffers handed out from the end of the iov downwards */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <hf3fs_usrbio.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 65536
#define DEPTH 8
#define ROUNDS 16
#define NEED(condition) need(__LINE__, #condition, condition)

static const char *mount_point;

static void need(int line, const char *what, bool holds) {
  if (holds) return;
  fprintf(stderr, "line %d: %s (errno %s)\n", line, what, strerror(errno));
  exit(1);
}

static void pattern(uint8_t *bytes, size_t count, unsigned seed) {
  for (size_t i = 0; i < count; i++) bytes[i] = (uint8_t)((i * 31 + i / 251 + seed) & 0xff);
}

/* Memory that the application has already, made shared at the same address. */
static void share_in_place(uint8_t *memory, size_t size, char *name) {
  uint8_t *copy = malloc(size);
  memcpy(copy, memory, size);
  sprintf(name, "/hf3fs-test.%d.%p", (int)getpid(), (void *)memory);
  int fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
  NEED(fd >= 0);
  NEED(ftruncate(fd, (off_t)size) == 0);
  NEED(mmap(memory, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == memory);
  close(fd);
  memcpy(memory, copy, size);
  free(copy);
}

struct poller {
  struct hf3fs_ior ior;
  int expected;
  uint64_t seen; /* a bit per userdata */
};

static void *poll_results(void *argument) {
  struct poller *poller = argument;
  static __thread struct hf3fs_cqe cqes[1024];
  while (poller->expected > 0) {
    struct timespec wrong; /* hours after the boot: long ago for the clock that is meant */
    clock_gettime(CLOCK_MONOTONIC, &wrong);
    wrong.tv_nsec += 10000000; /* and not carried */
    int count = hf3fs_wait_for_ios(&poller->ior, cqes, 1024, 1, &wrong);
    NEED(count >= 0);
    for (int i = 0; i < count; i++) {
      NEED(cqes[i].result == BLOCK);
      poller->seen |= (uint64_t)1 << (uintptr_t)cqes[i].userdata;
    }
    poller->expected -= count;
  }
  return NULL;
}

static void transfer_once(struct poller *poller, struct hf3fs_iov *iov, bool read, int handle) {
  poller->expected = DEPTH;
  poller->seen = 0;
  for (uintptr_t i = 0; i < DEPTH; i++)
    NEED(hf3fs_prep_io(&poller->ior, iov, read, iov->base + i * BLOCK, handle, i * BLOCK, BLOCK,
                       (void *)i) >= 0);
  NEED(hf3fs_submit_ios(&poller->ior) == 0);
  pthread_t thread;
  NEED(pthread_create(&thread, NULL, poll_results, poller) == 0);
  pthread_join(thread, NULL);
  NEED(poller->seen == (1u << DEPTH) - 1);
}

static void transfer(const char *path) {
  char found[256], name[64], link[512];
  uint8_t id[16] = "0123456789abcdef";
  NEED(hf3fs_extract_mount_point(found, sizeof found, mount_point) > 0);
  int fd = open(path, O_RDWR | O_CREAT, 0600);
  int handle = hf3fs_reg_fd(fd, 0);
  NEED(handle < 0);
  uint8_t *memory = mmap(NULL, DEPTH * BLOCK, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  pattern(memory, DEPTH * BLOCK, 1);
  share_in_place(memory, DEPTH * BLOCK, name);
  snprintf(link, sizeof link, "%s/3fs-virt/iovs/30313233-3435-3637-3839-616263646566", found);
  char target[128];
  snprintf(target, sizeof target, "/dev/shm%s", name);
  NEED(symlink(target, link) == 0);
  struct hf3fs_iov iov, own;
  NEED(hf3fs_iovwrap(&iov, memory, id, found, DEPTH * BLOCK, BLOCK, -1) == 0);
  NEED(hf3fs_iovcreate(&own, found, DEPTH * BLOCK, DEPTH * BLOCK, -1) == 0);
  struct poller writing, reading;
  NEED(hf3fs_iorcreate(&writing.ior, found, DEPTH, false, 0, -1) == 0);
  NEED(hf3fs_iorcreate(&reading.ior, found, DEPTH, true, 0, -1) == 0);
  for (unsigned round = 0; round < ROUNDS; round++) {
    pattern(memory, DEPTH * BLOCK, round);
    transfer_once(&writing, &iov, false, handle);
    memset(own.base, 0, DEPTH * BLOCK);
    transfer_once(&reading, &own, true, fd);
    NEED(memcmp(memory, own.base, DEPTH * BLOCK) == 0);
  }
  hf3fs_iordestroy(&writing.ior), hf3fs_iordestroy(&reading.ior);
  hf3fs_iovdestroy(&iov), hf3fs_iovdestroy(&own);
  NEED(memory[5] == (uint8_t)(5 * 31 + ROUNDS - 1)); /* the wrapped memory is still there */
  unlink(link), shm_unlink(name);
  hf3fs_dereg_fd(fd);
  NEED(close(fd) == 0);
}

static void commit(struct hf3fs_ior *ior, struct hf3fs_iov *iov, bool read, int fd, int round) {
  struct hf3fs_cqe cqes[DEPTH];
  for (int i = 0; i < DEPTH; i++) {
    uint8_t *buffer = iov->base + iov->size - (size_t)(i + 1) * BLOCK;
    size_t offset = (size_t)((round * DEPTH + i) * 37 % (ROUNDS * DEPTH)) * BLOCK;
    if (!read) pattern(buffer, BLOCK, (unsigned)(offset / BLOCK));
    NEED(hf3fs_prep_io(ior, iov, read, buffer, fd, offset, BLOCK, NULL) >= 0);
  }
  NEED(hf3fs_submit_ios(ior) == 0);
  NEED(hf3fs_wait_for_ios(ior, cqes, DEPTH, DEPTH, NULL) == DEPTH);
  uint8_t *expected = malloc(BLOCK);
  for (int i = 0; i < DEPTH; i++) {
    NEED(cqes[i].result == BLOCK);
    pattern(expected, BLOCK, (unsigned)((round * DEPTH + i) * 37 % (ROUNDS * DEPTH)));
    if (read) NEED(memcmp(iov->base + iov->size - (size_t)(i + 1) * BLOCK, expected, BLOCK) == 0);
  }
  free(expected);
}

static void benchmark(const char *path) {
  int made = open(path, O_RDWR | O_CREAT, 0600);
  NEED(ftruncate(made, ROUNDS * DEPTH * BLOCK) == 0);
  NEED(close(made) == 0);
  struct hf3fs_iov iov;
  struct hf3fs_ior reading, writing;
  NEED(hf3fs_iorcreate3(&reading, mount_point, DEPTH, true, 0, 0, 1, -1) == 0);
  NEED(hf3fs_iorcreate(&writing, mount_point, DEPTH, false, 0, -1) == 0);
  NEED(hf3fs_iovcreate(&iov, mount_point, DEPTH * BLOCK + 4096, 0, -1) == 0);
  int fd = open(path, O_RDWR);
  NEED(hf3fs_reg_fd(fd, 0) <= 0);
  for (int round = 0; round < ROUNDS; round++) commit(&writing, &iov, false, fd, round);
  for (int round = 0; round < ROUNDS; round++) commit(&reading, &iov, true, fd, round);
  hf3fs_dereg_fd(fd);
  NEED(close(fd) == 0);
  hf3fs_iovdestroy(&iov); /* and the rings are left to the end of the process */
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  char path[4096];
  mount_point = argv[3];
  alarm(120);
  snprintf(path, sizeof path, "%s/file", argv[2]);
  if (strcmp(argv[1], "transfer") == 0) {
    transfer(path);
    return 0;
  }
  for (int worker = 0; worker < 3; worker++) {
    if (fork() != 0) continue;
    alarm(120);
    snprintf(path, sizeof path, "%s/file.%d", argv[2], worker);
    benchmark(path);
    exit(0);
  }
  for (int status; wait(&status) > 0;) NEED(status == 0);
  return 0;
}
