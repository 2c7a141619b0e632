/* libemberfs, compiled into this library with its names hidden: a program may have one of its own.
 * And what it does not offer, because it needs the inside of a ring. */
#define _GNU_SOURCE
#define PUBLIC
#include "emberfs/emberfs.c"

#include "client.h"

void abandon_ring(struct emberfs_ring *ring) {
  munmap(ring->memory, ring->bytes);
  close(ring->bell);
  free(ring);
}

bool ring_is_cut(const struct emberfs_ring *ring) {
  char bell;
  ssize_t count = recv(ring->bell, &bell, 1, MSG_PEEK | MSG_DONTWAIT);
  return count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR);
}
