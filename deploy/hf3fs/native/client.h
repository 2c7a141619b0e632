/* libemberfs, and what this library needs to know of its rings besides. */
#ifndef EMBERFS_HF3FS_CLIENT_H
#define EMBERFS_HF3FS_CLIENT_H

#include <stdbool.h>

#include "emberfs/emberfs.h"

/* In a forked child: let go of the parent's ring without a word to the daemon, which would take it
 * for the parent's. */
void abandon_ring(struct emberfs_ring *ring);

/* Has the daemon gone? For those who never wait: emberfs_wait finds it out only while it waits. */
bool ring_is_cut(const struct emberfs_ring *ring);

#endif
