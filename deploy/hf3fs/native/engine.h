/* What performs I/O, behind one interface: rings do not know how bytes move.
 *
 * A ring opens one queue. It submits batches to it and reaps what is finished, in the order of
 * completion. Between submit and reap an I/O belongs to the engine. */
#ifndef EMBERFS_HF3FS_ENGINE_H
#define EMBERFS_HF3FS_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

struct registered_file;
struct engine_queue; /* the engine's own */

enum engine_priority { PRIORITY_HIGH, PRIORITY_NORMAL, PRIORITY_LOW, PRIORITIES };

struct engine_io {
  bool read;
  int fd; /* stays open until the I/O is reaped */
  void *memory;
  uint64_t length; /* bytes, above 0 */
  uint64_t offset; /* bytes, in the file */
  int64_t result;  /* set by the engine: bytes or -errno */
  struct engine_io *next;
  struct engine_queue *queue; /* the engine's */

  /* The ring's: the engine does not change them. */
  struct registered_file *file;
  const void *userdata;
  int32_t index;
};

struct engine {
  /* For I/Os with an index below `entries`. NULL: no memory. */
  struct engine_queue *(*open)(enum engine_priority priority, int entries);
  /* Start a list of I/Os, linked by next. Always accepted: a ring bounds what is in flight. */
  void (*submit)(struct engine_queue *queue, struct engine_io *batch);
  /* Wait until at least `least` results are there or the deadline (CLOCK_REALTIME, NULL: none) has
   * passed; return up to `most` of them, linked by next. Never waits if least is 0. */
  struct engine_io *(*reap)(struct engine_queue *queue, int most, int least,
                            const struct timespec *deadline);
  /* Drop what has not started, wait for what has; nothing touches the I/Os afterwards. */
  void (*close)(struct engine_queue *queue);
  /* fork(2): between prepare and after no other thread is inside the engine. A child begins with
   * empty queues: what is in flight is the parent's. */
  void (*fork_prepare)(void);
  void (*fork_parent)(void);
  void (*fork_child)(void);
};

/* preadv and pwritev on the mount from a few threads. */
extern const struct engine engine_pool;
/* Rings of the mount's daemon where they can, and engine_pool for all else. */
extern const struct engine engine_shared;

#endif
