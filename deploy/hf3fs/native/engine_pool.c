/* An engine that performs I/O with preadv and pwritev on the mount, from a few threads.
 *
 * Threads start with the first I/O, are at most THREADS_MAX (or EMBERFS_HF3FS_THREADS) in a process
 * for all rings, and end when there was nothing to do for a second. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "engine.h"

#define THREADS_DEFAULT 8
#define THREADS_MAX 64
#define STACK_BYTES (256u << 10)
#define IDLE_S 1
#define LOWER_FIRST_EVERY 8 /* one in so many picks serves low priority first: nobody starves */
#define CALL_BYTES_MAX (1ull << 30) /* the kernel takes 2 GiB at most in one call */

struct list {
  struct engine_io *first, **end;
};

struct engine_queue {
  struct engine_queue *next, **before;
  enum engine_priority priority;
  struct list done;
  int done_count, running;
  int wanted; /* results that the least demanding waiter waits for */
  pthread_cond_t changed;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool ready; /* once has happened */
static pthread_cond_t wake; /* on CLOCK_MONOTONIC */
static struct list pending[PRIORITIES];
static int pending_count, threads, threads_allowed, idle, picks;
static struct engine_queue *queues;

static void clear(struct list *list) {
  list->first = NULL;
  list->end = &list->first;
}

static void append(struct list *list, struct engine_io *io) {
  io->next = NULL;
  *list->end = io;
  list->end = &io->next;
}

static struct engine_io *take_first(struct list *list) {
  struct engine_io *io = list->first;
  if (io && !(list->first = io->next)) list->end = &list->first;
  return io;
}

static void make_wake(void) {
  pthread_condattr_t attributes;
  pthread_condattr_init(&attributes);
  pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
  pthread_cond_init(&wake, &attributes);
  pthread_condattr_destroy(&attributes);
}

static void start_empty(void) {
  const char *setting = getenv("EMBERFS_HF3FS_THREADS");
  int count = setting ? atoi(setting) : 0;
  threads_allowed = count < 1 ? THREADS_DEFAULT : count < THREADS_MAX ? count : THREADS_MAX;
  make_wake();
  for (int i = 0; i < PRIORITIES; i++) clear(&pending[i]);
  pending_count = threads = idle = 0;
  ready = true;
}

static struct engine_io *pick(void) {
  bool upwards = ++picks % LOWER_FIRST_EVERY == 0;
  for (int i = 0; i < PRIORITIES; i++) {
    struct engine_io *io = take_first(&pending[upwards ? PRIORITIES - 1 - i : i]);
    if (!io) continue;
    pending_count--;
    io->queue->running++;
    return io;
  }
  return NULL;
}

/* All of it, or less at the end of a file; an error that comes amid it is the result, because who
 * sees a short read believes that the file ends there. */
static int64_t transfer(const struct engine_io *io) {
  uint64_t done = 0;
  while (done < io->length) {
    uint64_t left = io->length - done;
    struct iovec piece = {.iov_base = (char *)io->memory + done,
                          .iov_len = left < CALL_BYTES_MAX ? left : CALL_BYTES_MAX};
    off_t place = (off_t)(io->offset + done);
    ssize_t count = io->read ? preadv(io->fd, &piece, 1, place) : pwritev(io->fd, &piece, 1, place);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return -errno;
    if (count == 0) return io->read ? (int64_t)done : -EIO;
    done += (uint64_t)count;
  }
  return (int64_t)done;
}

/* Called with the lock, which is open meanwhile. */
static void perform(struct engine_io *io) {
  struct engine_queue *queue = io->queue;
  pthread_mutex_unlock(&lock);
  io->result = transfer(io);
  pthread_mutex_lock(&lock);
  queue->running--;
  append(&queue->done, io);
  if (++queue->done_count >= queue->wanted || queue->running == 0)
    pthread_cond_broadcast(&queue->changed);
}

static void *work(void *unused) {
  (void)unused;
  pthread_mutex_lock(&lock);
  for (;;) {
    struct engine_io *io = pick();
    if (io) {
      perform(io);
      continue;
    }
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += IDLE_S;
    idle++;
    int timed_out = 0;
    while (pending_count == 0 && !timed_out)
      timed_out = pthread_cond_timedwait(&wake, &lock, &until);
    idle--;
    if (pending_count == 0) break;
  }
  threads--;
  pthread_mutex_unlock(&lock);
  return NULL;
}

/* Signals of the application are none of our threads' business. */
static bool start_thread(void) {
  sigset_t all, before;
  pthread_attr_t attributes;
  pthread_t thread;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  bool started = pthread_create(&thread, &attributes, work, NULL) == 0;
  if (started) pthread_setname_np(thread, "hf3fs-io"); /* we hold the lock: it has not ended */
  pthread_attr_destroy(&attributes);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return started;
}

static struct engine_queue *pool_open(enum engine_priority priority, int entries) {
  (void)entries;
  pthread_once(&once, start_empty);
  struct engine_queue *queue = calloc(1, sizeof *queue);
  if (!queue) return NULL;
  queue->priority = priority;
  queue->wanted = INT_MAX;
  clear(&queue->done);
  pthread_cond_init(&queue->changed, NULL); /* on CLOCK_REALTIME, as deadlines are */
  pthread_mutex_lock(&lock);
  queue->next = queues;
  queue->before = &queues;
  if (queues) queues->before = &queue->next;
  queues = queue;
  pthread_mutex_unlock(&lock);
  return queue;
}

static void pool_submit(struct engine_queue *queue, struct engine_io *batch) {
  pthread_mutex_lock(&lock);
  for (struct engine_io *io = batch, *next; io; io = next) {
    next = io->next;
    io->queue = queue;
    append(&pending[queue->priority], io);
    pending_count++;
  }
  for (int i = pending_count < idle ? pending_count : idle; i > 0; i--) pthread_cond_signal(&wake);
  for (int missing = pending_count - idle; missing > 0 && threads < threads_allowed; missing--) {
    if (!start_thread()) break;
    threads++;
  }
  /* No thread could be started: the caller does the work itself. */
  for (struct engine_io *io; threads == 0 && (io = pick());) perform(io);
  pthread_mutex_unlock(&lock);
}

static struct engine_io *pool_reap(struct engine_queue *queue, int most, int least,
                                   const struct timespec *deadline) {
  struct list taken;
  clear(&taken);
  pthread_mutex_lock(&lock);
  int timed_out = 0;
  while (queue->done_count < least && !timed_out) {
    if (queue->wanted > least) queue->wanted = least;
    timed_out = deadline ? pthread_cond_timedwait(&queue->changed, &lock, deadline)
                         : pthread_cond_wait(&queue->changed, &lock);
    queue->wanted = INT_MAX; /* other waiters were woken as well and say again what they want */
  }
  for (struct engine_io *io; most > 0 && (io = take_first(&queue->done)); most--) {
    queue->done_count--;
    append(&taken, io);
  }
  pthread_mutex_unlock(&lock);
  return taken.first;
}

static void drop_pending(const struct engine_queue *queue) {
  struct list *list = &pending[queue->priority];
  struct engine_io *io = list->first;
  clear(list);
  for (struct engine_io *next; io; io = next) {
    next = io->next;
    if (io->queue == queue)
      pending_count--;
    else
      append(list, io);
  }
}

static void pool_close(struct engine_queue *queue) {
  pthread_mutex_lock(&lock);
  drop_pending(queue);
  while (queue->running > 0) pthread_cond_wait(&queue->changed, &lock);
  *queue->before = queue->next;
  if (queue->next) queue->next->before = queue->before;
  pthread_mutex_unlock(&lock);
  pthread_cond_destroy(&queue->changed);
  free(queue);
}

static void pool_fork_prepare(void) { pthread_mutex_lock(&lock); }

static void pool_fork_parent(void) { pthread_mutex_unlock(&lock); }

static void pool_fork_child(void) {
  for (struct engine_queue *queue = queues; queue; queue = queue->next) {
    clear(&queue->done);
    queue->done_count = queue->running = 0;
    queue->wanted = INT_MAX;
    pthread_cond_init(&queue->changed, NULL);
  }
  if (ready) start_empty(); /* of the parent's threads none is here */
  pthread_mutex_unlock(&lock);
}

const struct engine engine_pool = {
    .open = pool_open,
    .submit = pool_submit,
    .reap = pool_reap,
    .close = pool_close,
    .fork_prepare = pool_fork_prepare,
    .fork_parent = pool_fork_parent,
    .fork_child = pool_fork_child,
};
