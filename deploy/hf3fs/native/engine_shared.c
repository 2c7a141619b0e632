/* An engine that hands I/O to the daemon of the mount, in memory that both share (docs/rings.md).
 *
 * It takes what lies in memory of a daemon that takes the file; engine_pool performs all else, of
 * the same queue. Which daemon a queue has a ring of is told by the first such I/O. There are no
 * threads: who waits for results takes them from the ring, one at a time, and the others wait for
 * him. While both have I/O under way, he looks after one for a moment, then after the other. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "daemons.h"

#define RING_ENTRIES_MAX (1 << 15)
#define LENGTH_MAX (1ull << 30)
#define AT_ONCE 64
#define SECOND_NS 1000000000LL
#define IDLE_NS SECOND_NS    /* submitting ends this wait */
#define ROUND_NS 20000000LL  /* another waiter may want less, I/O of the other kind may come */
#define MIXED_NS 500000LL

struct engine_queue {
  struct engine_queue *next, **before;
  struct engine_queue *pool; /* engine_pool's own */
  enum engine_priority priority;
  int entries;
  struct daemon *daemon, *refused; /* whose ring this is; who made none */
  struct emberfs_ring *ring;
  struct engine_io **flying; /* by index, those in the ring */
  int flying_count, pool_count, done_count;
  struct engine_io *done, **done_end;
  bool polling; /* somebody waits for the ring */
  pthread_cond_t changed;
};

static struct engine_queue *queues;

static void lock(void) { pthread_mutex_lock(&daemons_lock); }

static void unlock(void) { pthread_mutex_unlock(&daemons_lock); }

static void start_empty(struct engine_queue *queue) {
  queue->daemon = queue->refused = NULL;
  queue->ring = NULL;
  memset(queue->flying, 0, (size_t)queue->entries * sizeof *queue->flying);
  queue->flying_count = queue->pool_count = queue->done_count = 0;
  queue->done = NULL;
  queue->done_end = &queue->done;
  queue->polling = false;
  pthread_cond_init(&queue->changed, NULL); /* on CLOCK_REALTIME, as deadlines are */
}

static struct engine_queue *shared_open(enum engine_priority priority, int entries) {
  struct engine_queue *queue = calloc(1, sizeof *queue);
  if (!queue) return NULL;
  queue->priority = priority;
  queue->entries = entries;
  queue->flying = calloc((size_t)entries, sizeof *queue->flying);
  queue->pool = queue->flying ? engine_pool.open(priority, entries) : NULL;
  if (!queue->pool) {
    free(queue->flying);
    free(queue);
    return NULL;
  }
  start_empty(queue);
  lock();
  queue->next = queues;
  queue->before = &queues;
  if (queues) queues->before = &queue->next;
  queues = queue;
  unlock();
  return queue;
}

/* ------------------------------------------------------------ submitting */

/* Is there nothing to ask this daemon for a ring? One of a daemon that has gone is given up. */
static bool is_settled(const struct engine_queue *queue, const struct daemon *daemon) {
  if (queue->daemon == daemon || queue->refused == daemon) return true;
  return queue->daemon && (!queue->daemon->gone || queue->flying_count > 0 || queue->polling);
}

/* The lock is held; whose ring it was is still in use. */
static struct emberfs_ring *detach(struct engine_queue *queue, struct daemon **daemon) {
  struct emberfs_ring *ring = queue->ring;
  *daemon = queue->daemon;
  queue->ring = NULL;
  queue->daemon = NULL;
  return ring;
}

static void end_ring(struct emberfs_ring *ring, struct daemon *daemon) {
  if (!ring) return;
  emberfs_ring_destroy(ring);
  lock();
  release_daemon(daemon);
  unlock();
}

static void attach(struct engine_queue *queue, struct daemon *daemon) {
  struct emberfs_terms terms = {.entries = 1, .priority = (int32_t)queue->priority - 1};
  struct emberfs_ring *ring = NULL, *before = NULL;
  struct daemon *former = NULL;
  while (terms.entries < (uint32_t)queue->entries && terms.entries < RING_ENTRIES_MAX)
    terms.entries *= 2;
  lock();
  bool settled = is_settled(queue, daemon);
  if (!settled) before = detach(queue, &former);
  unlock();
  if (settled) return;
  end_ring(before, former);
  if (emberfs_ring_create(daemon->client, &terms, &ring) != 0) warn_once("no ring");
  lock();
  bool wanted = ring && !queue->ring; /* or another thread was faster */
  if (wanted) {
    use_daemon(daemon);
    queue->ring = ring;
    queue->daemon = daemon;
  } else if (!ring) {
    queue->refused = daemon;
  }
  unlock();
  if (ring && !wanted) emberfs_ring_destroy(ring);
}

/* The lock is held. False: not for the ring, or not before its daemon was asked. */
static bool put(struct engine_queue *queue, struct engine_io *io, struct daemon **stranger) {
  struct shared_memory *memory = find_memory(io->memory, io->length);
  *stranger = NULL;
  if (!memory || io->length > LENGTH_MAX) return false;
  if (!is_introduced(memory->daemon, io->file) || !is_settled(queue, memory->daemon)) {
    *stranger = memory->daemon;
    return false;
  }
  if (queue->daemon != memory->daemon) return false;
  if (io->file->synchronous || io->file->daemon != memory->daemon || io->file->number <= 0)
    return false;
  if (emberfs_prepare(queue->ring, io->read ? EMBERFS_READ : EMBERFS_WRITE, io->file->number,
                      io->offset, &memory->region, io->memory, (uint32_t)io->length,
                      (uint64_t)io->index) != 0)
    return false;
  queue->flying[io->index] = io;
  queue->flying_count++;
  return true;
}

/* The lock is held, and open while a daemon is asked. */
static bool take(struct engine_queue *queue, struct engine_io *io) {
  struct daemon *stranger;
  if (put(queue, io, &stranger)) return true;
  if (!stranger) return false;
  use_daemon(stranger);
  unlock();
  introduce_file(stranger, io->file);
  attach(queue, stranger);
  lock();
  release_daemon(stranger);
  return put(queue, io, &stranger);
}

static void shared_submit(struct engine_queue *queue, struct engine_io *batch) {
  struct engine_io *rest = NULL, **end = &rest;
  lock();
  for (struct engine_io *io = batch, *next; io; io = next) {
    next = io->next;
    if (take(queue, io)) continue;
    *end = io;
    end = &io->next;
    queue->pool_count++;
  }
  *end = NULL;
  if (queue->ring) emberfs_submit(queue->ring);
  pthread_cond_broadcast(&queue->changed);
  unlock();
  if (rest) engine_pool.submit(queue->pool, rest);
}

/* ------------------------------------------------------------ reaping */

static void finish(struct engine_queue *queue, struct engine_io *io) {
  io->next = NULL;
  *queue->done_end = io;
  queue->done_end = &io->next;
  queue->done_count++;
}

static void land(struct engine_queue *queue, uint64_t index, int64_t result) {
  struct engine_io *io = index < (uint64_t)queue->entries ? queue->flying[index] : NULL;
  if (!io) return;
  queue->flying[index] = NULL;
  queue->flying_count--;
  io->result = result;
  finish(queue, io);
}

/* The daemon has gone: it tells of nothing any more. */
static void lose(struct engine_queue *queue) {
  queue->daemon->gone = true;
  for (int i = 0; i < queue->entries; i++) land(queue, (uint64_t)i, -ENOTCONN);
}

/* The lock is held, and open while it waits. */
static void poll_ring(struct engine_queue *queue, int least, int64_t patience_ns) {
  struct emberfs_completion found[AT_ONCE];
  struct timespec patience = {patience_ns / SECOND_NS, patience_ns % SECOND_NS};
  struct emberfs_ring *ring = queue->ring;
  queue->polling = true;
  unlock();
  int count = emberfs_wait(ring, found, AT_ONCE, (unsigned)least, &patience);
  bool cut = count < 0 || (count == 0 && ring_is_cut(ring));
  lock();
  queue->polling = false;
  for (int i = 0; i < count; i++) land(queue, found[i].user_data, found[i].result);
  if (cut) lose(queue);
  pthread_cond_broadcast(&queue->changed);
}

static void take_from_pool(struct engine_queue *queue, struct engine_io *io) {
  for (struct engine_io *next; io; io = next) {
    next = io->next;
    queue->pool_count--;
    finish(queue, io);
  }
}

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  return now.tv_sec * SECOND_NS + now.tv_nsec;
}

static struct timespec in(int64_t ns) {
  int64_t then_ns = now_ns() + ns;
  return (struct timespec){then_ns / SECOND_NS, then_ns % SECOND_NS};
}

static int64_t lesser(int64_t one, int64_t other) { return one < other ? one : other; }

static int64_t left_ns(const struct timespec *deadline) {
  if (!deadline) return INT64_MAX;
  if (deadline->tv_sec > INT64_MAX / SECOND_NS - 1) return INT64_MAX;
  if (deadline->tv_sec < 0) return 0;
  return deadline->tv_sec * SECOND_NS + deadline->tv_nsec - now_ns();
}

/* Look for results, and wait up to so long for those that are missing. The lock is held, and open
 * meanwhile. */
static void look(struct engine_queue *queue, int missing, int64_t patience_ns) {
  if (queue->flying_count > 0 && !queue->polling) {
    bool mixed = queue->pool_count > 0;
    int wanted = patience_ns == 0 ? 0 : mixed && missing > 1 ? 1 : missing;
    poll_ring(queue, wanted, lesser(patience_ns, mixed ? MIXED_NS : ROUND_NS));
  } else if (patience_ns > 0 && queue->pool_count > 0) {
    int wanted = (int)lesser(missing, queue->pool_count);
    struct timespec until = in(lesser(patience_ns, ROUND_NS));
    unlock();
    struct engine_io *found = engine_pool.reap(queue->pool, INT_MAX, wanted, &until);
    lock();
    take_from_pool(queue, found);
  } else if (patience_ns > 0) {
    struct timespec until = in(lesser(patience_ns, IDLE_NS));
    pthread_cond_timedwait(&queue->changed, &daemons_lock, &until);
  }
  if (queue->pool_count > 0)
    take_from_pool(queue, engine_pool.reap(queue->pool, INT_MAX, 0, NULL));
}

static struct engine_io *shared_reap(struct engine_queue *queue, int most, int least,
                                     const struct timespec *deadline) {
  lock();
  for (bool over = false; !over;) {
    int missing = queue->done_count < least ? least - queue->done_count : 0;
    int64_t patience_ns = missing ? left_ns(deadline) : 0;
    over = patience_ns <= 0;
    look(queue, missing, over ? 0 : patience_ns);
    over = over || queue->done_count >= least;
  }
  struct engine_io *taken = queue->done, **end = &taken;
  for (; most > 0 && *end; most--, end = &(*end)->next) queue->done_count--;
  queue->done = *end;
  if (!queue->done) queue->done_end = &queue->done;
  *end = NULL;
  unlock();
  return taken;
}

static void shared_close(struct engine_queue *queue) {
  struct daemon *daemon;
  engine_pool.close(queue->pool);
  lock();
  while (queue->flying_count > 0) { /* the daemon may still write to the program's memory */
    if (queue->polling)
      pthread_cond_wait(&queue->changed, &daemons_lock);
    else
      poll_ring(queue, queue->flying_count, ROUND_NS);
  }
  *queue->before = queue->next;
  if (queue->next) queue->next->before = queue->before;
  struct emberfs_ring *ring = detach(queue, &daemon);
  unlock();
  end_ring(ring, daemon);
  pthread_cond_destroy(&queue->changed);
  free(queue->flying);
  free(queue);
}

/* ------------------------------------------------------------ fork */

static void shared_fork_child(void) {
  for (struct engine_queue *queue = queues; queue; queue = queue->next) {
    if (queue->ring) abandon_ring(queue->ring);
    start_empty(queue);
  }
  forget_daemons_of_parent();
  unlock();
}

const struct engine engine_shared = {
    .open = shared_open,
    .submit = shared_submit,
    .reap = shared_reap,
    .close = shared_close,
    .fork_prepare = lock,
    .fork_parent = unlock,
    .fork_child = shared_fork_child,
};
