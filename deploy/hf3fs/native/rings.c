/* Rings: which I/O is prepared, under way, finished. How it is performed is the engine's matter. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define ENTRIES_MAX (1 << 20)
#define NANOSECONDS 1000000000L
/* What a ring of 3FS takes in shared memory; programs plan with it, and ours fits into it. */
#define FIXED_BYTES (16 + 32 + 4096)
#define ENTRY_BYTES 96

struct ring {
  struct ring *next, **before;
  const struct engine *engine;
  struct engine_queue *queue;
  int entries;
  bool for_read;
  struct engine_io *slots; /* one per entry; in use while its file is set */
  int32_t *free_slots;     /* a stack */
  int free_count;
  struct engine_io *prepared, **prepared_end;
};

_Static_assert(sizeof(struct engine_io) + sizeof(int32_t) <= ENTRY_BYTES, "a slot is too large");
_Static_assert(sizeof(struct hf3fs_iov) == 312 && sizeof(struct hf3fs_ior) == 600 &&
                   sizeof(struct hf3fs_cqe) == 24,
               "programs are compiled against these sizes");

static struct ring *rings;

static void empty(struct ring *ring) {
  ring->prepared = NULL;
  ring->prepared_end = &ring->prepared;
  for (int i = 0; i < ring->entries; i++) {
    if (ring->slots[i].file) release_file(ring->slots[i].file);
    ring->slots[i].file = NULL;
    ring->free_slots[i] = ring->entries - 1 - i; /* the first is given out first */
  }
  ring->free_count = ring->entries;
}

/* The lock is held. What was prepared or under way goes on in the parent only. */
void reset_rings_of_child(void) {
  for (struct ring *ring = rings; ring; ring = ring->next) empty(ring);
}

EXPORTED size_t hf3fs_ior_size(int entries) {
  return entries < 0 ? 0 : FIXED_BYTES + (size_t)ENTRY_BYTES * ((size_t)entries + 1);
}

static struct ring *make_ring(int entries, bool for_read, int priority, void *memory) {
  struct ring *ring = calloc(1, sizeof *ring);
  if (!ring) return NULL;
  ring->engine = &engine_shared;
  ring->queue = ring->engine->open(priority < 0   ? PRIORITY_HIGH
                                   : priority > 0 ? PRIORITY_LOW
                                                  : PRIORITY_NORMAL,
                                   entries);
  if (!ring->queue) {
    free(ring);
    return NULL;
  }
  ring->entries = entries;
  ring->for_read = for_read;
  ring->slots = memory;
  ring->free_slots = (int32_t *)(ring->slots + entries);
  prepare_process();
  lock_state();
  empty(ring);
  ring->next = rings;
  ring->before = &rings;
  if (rings) rings->before = &ring->next;
  rings = ring;
  unlock_state();
  return ring;
}

static int create(struct hf3fs_ior *ior, const char *mount_point, int entries, bool for_read,
                  int io_depth, int priority, int timeout, int numa, uint64_t flags) {
  if (!ior || !mount_point || entries <= 0 || entries > ENTRIES_MAX || timeout < 0) return -EINVAL;
  if (io_depth > entries || io_depth < -entries) return -EINVAL;
  if (flags & ~(uint64_t)(HF3FS_IOR_ALLOW_READ_UNCOMMITTED | HF3FS_IOR_FORBID_READ_HOLES))
    return -EINVAL;
  if (flags & HF3FS_IOR_FORBID_READ_HOLES) return -ENOTSUP; /* the kernel does not tell us holes */
  int problem = check_mount_point(mount_point);
  if (problem) return problem;
  void *memory = calloc(1, hf3fs_ior_size(entries));
  struct ring *ring = memory ? make_ring(entries, for_read, priority, memory) : NULL;
  if (!ring) {
    free(memory);
    return -ENOMEM;
  }
  memset(ior, 0, sizeof *ior);
  ior->iov.base = memory;
  ior->iov.size = hf3fs_ior_size(entries);
  ior->iov.numa = numa;
  make_uuid((uint8_t *)ior->iov.id);
  strcpy(ior->iov.mount_point, mount_point);
  strcpy(ior->mount_point, mount_point);
  ior->iorh = ring;
  ior->for_read = for_read;
  ior->io_depth = io_depth;
  ior->priority = priority;
  ior->timeout = timeout;
  ior->flags = flags;
  return 0;
}

EXPORTED int hf3fs_iorcreate(struct hf3fs_ior *ior, const char *mount_point, int entries,
                             bool for_read, int io_depth, int numa) {
  return create(ior, mount_point, entries, for_read, io_depth, 0, 0, numa, 0);
}

EXPORTED int hf3fs_iorcreate2(struct hf3fs_ior *ior, const char *mount_point, int entries,
                              bool for_read, int io_depth, int priority, int numa) {
  return create(ior, mount_point, entries, for_read, io_depth, priority, 0, numa, 0);
}

EXPORTED int hf3fs_iorcreate3(struct hf3fs_ior *ior, const char *mount_point, int entries,
                              bool for_read, int io_depth, int priority, int timeout, int numa) {
  return create(ior, mount_point, entries, for_read, io_depth, priority, timeout, numa, 0);
}

EXPORTED int hf3fs_iorcreate4(struct hf3fs_ior *ior, const char *mount_point, int entries,
                              bool for_read, int io_depth, int timeout, int numa, uint64_t flags) {
  return create(ior, mount_point, entries, for_read, io_depth, 0, timeout, numa, flags);
}

EXPORTED void hf3fs_iordestroy(struct hf3fs_ior *ior) {
  if (!ior || !ior->iorh) return;
  struct ring *ring = ior->iorh;
  ior->iorh = NULL;
  ior->iov.base = NULL;
  ring->engine->close(ring->queue);
  lock_state();
  empty(ring);
  *ring->before = ring->next;
  if (ring->next) ring->next->before = ring->before;
  unlock_state();
  free(ring->slots);
  free(ring);
}

EXPORTED int hf3fs_io_entries(const struct hf3fs_ior *ior) {
  return ior && ior->iorh ? ((struct ring *)ior->iorh)->entries : -EINVAL;
}

static bool inside(const struct hf3fs_iov *iov, const void *memory, uint64_t length) {
  const uint8_t *first = memory;
  if (!iov->base || first < iov->base || length > iov->size) return false;
  return (size_t)(first - iov->base) <= iov->size - length;
}

/* The lock is held. */
static int prepare(struct ring *ring, const struct engine_io *asked, int fd) {
  struct registered_file *file = find_file(fd);
  if (!file) return -EBADF;
  if (file->access == (asked->read ? O_WRONLY : O_RDONLY)) return -EACCES;
  if (ring->free_count == 0) return -EAGAIN;
  int32_t index = ring->free_slots[--ring->free_count];
  struct engine_io *io = &ring->slots[index];
  *io = *asked;
  io->index = index;
  io->file = file;
  io->fd = file->io_fd;
  file->references++;
  *ring->prepared_end = io;
  ring->prepared_end = &io->next;
  return index;
}

EXPORTED int hf3fs_prep_io(const struct hf3fs_ior *ior, const struct hf3fs_iov *iov, bool read,
                           void *ptr, int fd, size_t off, uint64_t len, const void *userdata) {
  if (!ior || !ior->iorh || !iov || !ptr || len == 0) return -EINVAL;
  struct ring *ring = ior->iorh;
  if (read != ring->for_read || !inside(iov, ptr, len)) return -EINVAL;
  if (off > INT64_MAX || len > INT64_MAX - off) return -EINVAL;
  struct engine_io asked = {
      .read = read, .memory = ptr, .length = len, .offset = off, .userdata = userdata};
  lock_state();
  int index = prepare(ring, &asked, fd);
  unlock_state();
  return index;
}

static void submit_prepared(struct ring *ring) {
  lock_state();
  struct engine_io *batch = ring->prepared;
  ring->prepared = NULL;
  ring->prepared_end = &ring->prepared;
  unlock_state();
  if (batch) ring->engine->submit(ring->queue, batch);
}

EXPORTED int hf3fs_submit_ios(const struct hf3fs_ior *ior) {
  if (!ior || !ior->iorh) return -EINVAL;
  submit_prepared(ior->iorh);
  return 0;
}

/* Programs add to a time without carrying, or take it from another clock. */
static struct timespec carried(const struct timespec *time) {
  struct timespec sound = {.tv_sec = time->tv_sec + time->tv_nsec / NANOSECONDS,
                           .tv_nsec = time->tv_nsec % NANOSECONDS};
  if (sound.tv_nsec < 0) {
    sound.tv_nsec += NANOSECONDS;
    sound.tv_sec--;
  }
  return sound;
}

EXPORTED int hf3fs_wait_for_ios(const struct hf3fs_ior *ior, struct hf3fs_cqe *cqes, int cqec,
                                int min_results, const struct timespec *abs_timeout) {
  if (!ior || !ior->iorh || !cqes || cqec <= 0) return -EINVAL;
  struct ring *ring = ior->iorh;
  struct timespec deadline;
  if (abs_timeout) deadline = carried(abs_timeout);
  submit_prepared(ring); /* who forgot to submit does not wait for ever */
  struct engine_io *io = ring->engine->reap(ring->queue, cqec,
                                            min_results < cqec ? min_results : cqec,
                                            abs_timeout ? &deadline : NULL);
  int count = 0;
  lock_state();
  for (; io; io = io->next, count++) {
    cqes[count] = (struct hf3fs_cqe){
        .index = io->index, .result = io->result, .userdata = io->userdata};
    release_file(io->file);
    io->file = NULL;
    ring->free_slots[ring->free_count++] = io->index;
  }
  unlock_state();
  return count;
}
