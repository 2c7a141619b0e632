/* emberfs rings in C: batches of reads and writes that the client daemon of a mount performs.
 *
 * An application opens files through the mount, registers their descriptors, lets the daemon share
 * memory with it, and submits entries; data lands in that memory without passing through the kernel
 * or the application. Functions return 0 or more, or a negative errno; emberfs_reason() says more.
 *
 * A connection may be used by several threads; a ring by one thread at a time (one that prepares
 * and submits and one that waits may be two). None of it survives a fork.
 */
#ifndef EMBERFS_H
#define EMBERFS_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#ifdef __cplusplus
extern "C" {
#endif

struct emberfs;      /* a connection to the daemon */
struct emberfs_ring; /* a submission and a completion ring */

enum emberfs_operation { EMBERFS_READ = 0, EMBERFS_WRITE = 1 };

/* Memory that the daemon shares. `base` is where it is mapped. */
struct emberfs_region {
    void *base;
    size_t bytes; /* rounded up to pages */
    uint32_t number;
    int fd; /* its memfd: may be mapped again elsewhere */
};

/* How a ring is served. All zero: 256 entries of normal priority, begun as they come. */
struct emberfs_terms {
    uint32_t entries;   /* a power of two up to 32768; so many may be under way; 0: 256 */
    int32_t priority;   /* -1 before 0 before 1 */
    uint32_t depth;     /* with gather_us: begin when so many entries wait ... */
    uint32_t gather_us; /* ... or when the first has waited so long, up to a second */
};

struct emberfs_completion {
    uint64_t user_data;
    int64_t result; /* bytes, short at the end of the file, or a negative errno */
};

/* Connect to the daemon of the mount that `path` is on. */
int emberfs_connect(const char *path, struct emberfs **connection);

/* Rings and regions of the connection must have been given back. */
void emberfs_disconnect(struct emberfs *connection);

/* Words about this thread's last error, never NULL. */
const char *emberfs_reason(void);

/* Share memory. `at`: NULL, or a page-aligned address whose mapping is replaced (MAP_FIXED). */
int emberfs_region_create(struct emberfs *connection, size_t bytes, void *at,
                          struct emberfs_region *region);

/* Unmap it (unless `keep`, which leaves the mapping to the caller) and let the daemon forget it. */
void emberfs_region_destroy(struct emberfs *connection, struct emberfs_region *region, int keep);

/* Register a file that is open on the mount: its number. Forget it before closing `fd`. */
int64_t emberfs_file_register(struct emberfs *connection, int fd);
int emberfs_file_forget(struct emberfs *connection, int64_t file);

int emberfs_ring_create(struct emberfs *connection, const struct emberfs_terms *terms,
                        struct emberfs_ring **ring);
void emberfs_ring_destroy(struct emberfs_ring *ring);
unsigned emberfs_ring_entries(const struct emberfs_ring *ring);

/* Put one read or write into the ring; the daemon sees it after emberfs_submit.
 *
 * [memory, memory + bytes) lies in the region and is the daemon's until the completion. -EAGAIN: as
 * many are under way as the ring has entries; -EINVAL: the memory is not in the region.
 */
int emberfs_prepare(struct emberfs_ring *ring, enum emberfs_operation operation, int64_t file,
                    uint64_t offset, const struct emberfs_region *region, void *memory,
                    uint32_t bytes, uint64_t user_data);

/* Submit what was prepared; how many entries that are. */
int emberfs_submit(struct emberfs_ring *ring);

/* Take up to `max` completions, waiting for `min` of them until `timeout` (NULL: for ever) has
 * passed; how many. Fewer than `min`, also 0, after the timeout. -ENOTCONN: the daemon is gone.
 */
int emberfs_wait(struct emberfs_ring *ring, struct emberfs_completion *completions, unsigned max,
                 unsigned min, const struct timespec *timeout);

#ifdef __cplusplus
}
#endif
#endif
