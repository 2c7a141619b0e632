/* What the files of the library share. */
#ifndef EMBERFS_HF3FS_INTERNAL_H
#define EMBERFS_HF3FS_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "engine.h"
#include "hf3fs_usrbio.h"

#define EXPORTED __attribute__((visibility("default")))

/* mounts.c */
bool is_served(int fd);
/* 0 or -errno: -EINVAL no or too long a name, -ENOENT no mount of ours. */
int check_mount_point(const char *mount_point);
bool may_skip_file_system_check(void);

/* names.c */
#define UUID_TEXT_BYTES 37
void make_uuid(uint8_t id[16]);
void format_uuid(const uint8_t id[16], char text[UUID_TEXT_BYTES]);
/* The directory that holds the links of buffers of a mount; 0 or -errno. */
int link_directory(const char *mount_point, bool make, char *path, size_t size);

/* files.c: find and release with the state lock held. */
struct daemon;
struct registered_file {
  int fd;         /* the application's */
  int handle;     /* our duplicate, and the second name of the file */
  int io_fd;      /* the one I/O uses: handle, or one without O_APPEND */
  int access;     /* O_RDONLY, O_WRONLY, O_RDWR */
  bool synchronous; /* O_SYNC: each write is to be durable, which only the kernel sees to */
  int references; /* registration, and I/Os */
  struct registered_file *next;
  struct daemon *daemon; /* daemons.c's: who knows the file ... */
  int64_t number;        /* ... as this; 0 or less: it refused it */
};
struct registered_file *find_file(int fd);
void release_file(struct registered_file *file);
/* What was released for good, to be closed when the lock is not held: closing waits for the mount. */
struct registered_file *take_released(void);
void close_files(struct registered_file *files);

/* process.c: one lock for the tables and rings of the process, held for moments only. */
void lock_state(void);
void unlock_state(void);
void prepare_process(void); /* once per process: what fork needs */

/* notes.c: files that say where memory of a daemon is; who has found one opens the memory. */
struct shared_memory;
bool write_note(int fd, const struct shared_memory *memory);
int open_noted(int fd); /* the memory's descriptor, or -errno */

/* rings.c */
void reset_rings_of_child(void);

#endif
