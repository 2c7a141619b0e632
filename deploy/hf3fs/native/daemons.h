/* What this process shares with the daemons of mounts: connections, memory, files.
 *
 * Nobody waits for a daemon while the lock is held. */
#ifndef EMBERFS_HF3FS_DAEMONS_H
#define EMBERFS_HF3FS_DAEMONS_H

#include "client.h"
#include "internal.h"

struct daemon {
  struct daemon *next;
  struct emberfs *client; /* NULL: disconnected */
  unsigned major, minor;  /* of the mount */
  bool gone;              /* it has ended, or cut us off; or it is the parent's */
  int uses;               /* memory, rings, calls that are under way */
};

struct shared_memory {
  struct shared_memory *next, **before;
  struct daemon *daemon; /* NULL: the parent's */
  struct emberfs_region region;
};

extern pthread_mutex_t daemons_lock;

/* Memory that the daemon of a mount has made and mapped here. NULL: it offers none. */
struct shared_memory *share_memory(const char *mount_point, size_t size);
void unshare_memory(struct shared_memory *memory);

/* Tell a daemon of a file, unless it knows it; a refusal is remembered. */
void introduce_file(struct daemon *daemon, struct registered_file *file);
/* Before a file is closed. */
void forget_file(struct registered_file *file);

/* With the lock held. */
struct shared_memory *find_memory(const void *start, uint64_t length); /* NULL: not of a daemon */
bool is_introduced(const struct daemon *daemon, const struct registered_file *file);
void use_daemon(struct daemon *daemon);
void release_daemon(struct daemon *daemon);
void forget_daemons_of_parent(void);

/* Say once in a process why I/O takes the way through the mount. */
void warn_once(const char *what);

#endif
