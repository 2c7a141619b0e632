/* Connections to the daemons of mounts, and what goes over them: memory and files.
 *
 * A daemon is asked for memory when a program makes a buffer; whatever goes wrong then or later
 * leaves the way through the mount. Who has ended stays in the list, disconnected: files still
 * point to it. */
#define _GNU_SOURCE
#include "daemons.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

pthread_mutex_t daemons_lock = PTHREAD_MUTEX_INITIALIZER;
static struct daemon *daemons;
static struct shared_memory *memories;

static void lock(void) { pthread_mutex_lock(&daemons_lock); }

static void unlock(void) { pthread_mutex_unlock(&daemons_lock); }

void warn_once(const char *what) {
  static atomic_flag warned = ATOMIC_FLAG_INIT;
  if (!atomic_flag_test_and_set(&warned))
    fprintf(stderr, "hf3fs on emberfs: %s: %s; I/O goes through the mount\n", what,
            emberfs_reason());
}

void use_daemon(struct daemon *daemon) { daemon->uses++; }

void release_daemon(struct daemon *daemon) {
  if (--daemon->uses > 0 || !daemon->gone) return;
  emberfs_disconnect(daemon->client);
  daemon->client = NULL;
}

static struct daemon *find_daemon(unsigned major, unsigned minor) {
  for (struct daemon *daemon = daemons; daemon; daemon = daemon->next)
    if (!daemon->gone && daemon->major == major && daemon->minor == minor) return daemon;
  return NULL;
}

/* Note a connection, unless another thread was faster. The lock is held. */
static struct daemon *adopt(struct emberfs *client, const struct statx *mount) {
  struct daemon *daemon = find_daemon(mount->stx_dev_major, mount->stx_dev_minor);
  struct daemon *made = daemon ? NULL : calloc(1, sizeof *made);
  if (!made) {
    emberfs_disconnect(client);
    return daemon;
  }
  *made = (struct daemon){.next = daemons, .client = client, .major = mount->stx_dev_major,
                          .minor = mount->stx_dev_minor};
  daemons = made;
  return made;
}

/* The daemon of a mount, in use; NULL if there is none to talk to. */
static struct daemon *reach(const char *mount_point) {
  struct statx mount;
  struct emberfs *client = NULL;
  if (statx(AT_FDCWD, mount_point, AT_STATX_DONT_SYNC, 0, &mount) != 0) return NULL;
  lock();
  struct daemon *daemon = find_daemon(mount.stx_dev_major, mount.stx_dev_minor);
  if (!daemon) {
    unlock();
    int problem = emberfs_connect(mount_point, &client);
    if (problem && problem != -ENOENT) warn_once("no rings"); /* ENOENT: it offers none */
    lock();
    if (!problem) daemon = adopt(client, &mount);
  }
  if (daemon) use_daemon(daemon);
  unlock();
  return daemon;
}

static bool lost(int problem) { return problem == -ENOTCONN || problem == -ETIMEDOUT; }

/* Fill in memory of this daemon. When it has gone, the next one may be asked. */
static int ask_for_memory(struct daemon *daemon, size_t size, struct shared_memory *memory) {
  int problem = emberfs_region_create(daemon->client, size, NULL, &memory->region);
  lock();
  if (lost(problem)) daemon->gone = true;
  if (problem) {
    release_daemon(daemon);
  } else {
    memory->daemon = daemon; /* stays in use */
    memory->next = memories;
    memory->before = &memories;
    if (memories) memories->before = &memory->next;
    memories = memory;
  }
  unlock();
  return problem;
}

static bool is_wanted(void) {
  const char *setting = getenv("EMBERFS_HF3FS_RINGS");
  return !setting || strcmp(setting, "0") != 0;
}

struct shared_memory *share_memory(const char *mount_point, size_t size) {
  if (!is_wanted()) return NULL;
  struct shared_memory *memory = calloc(1, sizeof *memory);
  if (!memory) return NULL;
  prepare_process();
  for (int attempt = 0; attempt < 2; attempt++) { /* it may have been started anew */
    struct daemon *daemon = reach(mount_point);
    if (!daemon) break;
    int problem = ask_for_memory(daemon, size, memory);
    if (!problem) return memory;
    if (lost(problem)) continue;
    warn_once("no memory for rings");
    break;
  }
  free(memory);
  return NULL;
}

void unshare_memory(struct shared_memory *memory) {
  lock();
  struct daemon *daemon = memory->daemon;
  *memory->before = memory->next;
  if (memory->next) memory->next->before = memory->before;
  unlock();
  if (daemon) {
    emberfs_region_destroy(daemon->client, &memory->region, 0);
    lock();
    release_daemon(daemon);
    unlock();
  } else {
    munmap(memory->region.base, memory->region.bytes);
    close(memory->region.fd);
  }
  free(memory);
}

struct shared_memory *find_memory(const void *start, uint64_t length) {
  for (struct shared_memory *memory = memories; memory; memory = memory->next) {
    uintptr_t at = (uintptr_t)start - (uintptr_t)memory->region.base; /* wraps if before it */
    if (at >= memory->region.bytes || length > memory->region.bytes - at) continue;
    return memory->daemon && !memory->daemon->gone ? memory : NULL;
  }
  return NULL;
}

/* A file is of one mount: whose daemon has taken it is never asked about another's. */
bool is_introduced(const struct daemon *daemon, const struct registered_file *file) {
  if (file->synchronous || file->daemon == daemon) return true;
  return file->daemon && !file->daemon->gone && file->number > 0;
}

void introduce_file(struct daemon *daemon, struct registered_file *file) {
  lock();
  bool known = is_introduced(daemon, file);
  use_daemon(daemon);
  unlock();
  int64_t number = known ? 0 : emberfs_file_register(daemon->client, file->io_fd);
  if (number < 0 && number != -EBADF && !lost((int)number)) warn_once("a file");
  lock();
  bool twice = !known && is_introduced(daemon, file); /* another thread was faster */
  if (!known && !twice) file->daemon = daemon, file->number = number;
  if (lost((int)number)) daemon->gone = true;
  unlock();
  if (twice && number > 0) emberfs_file_forget(daemon->client, number);
  lock();
  release_daemon(daemon);
  unlock();
}

void forget_file(struct registered_file *file) {
  lock();
  struct daemon *daemon = file->daemon;
  bool known = daemon && !daemon->gone && file->number > 0;
  if (known) use_daemon(daemon);
  unlock();
  if (!known) return;
  emberfs_file_forget(daemon->client, file->number);
  lock();
  release_daemon(daemon);
  unlock();
}

/* The socket is closed here, or the daemon would not hear of the parent's end. */
void forget_daemons_of_parent(void) {
  for (struct shared_memory *memory = memories; memory; memory = memory->next)
    memory->daemon = NULL;
  for (struct daemon *daemon = daemons; daemon; daemon = daemon->next) {
    emberfs_disconnect(daemon->client);
    daemon->client = NULL;
    daemon->gone = true;
    daemon->uses = 0;
  }
}
