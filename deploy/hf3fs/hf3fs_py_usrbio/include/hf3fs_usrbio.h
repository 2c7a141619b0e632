/* The C interface of user-space batched I/O that clients of 3FS are written against, on emberfs.
 *
 * Link with -lhf3fs_api_shared. A program opens files on the mount as usual, registers the
 * descriptors, and moves data between them and buffers ("iov") through rings ("ior").
 * Functions return 0 or a count, and -errno on failure, unless said otherwise.
 * What differs from 3FS is told in docs/hf3fs.md. */
#ifndef HF3FS_USRBIO_H
#define HF3FS_USRBIO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HF3FS_SUPER_MAGIC 0x8f3f5fff

/* Flags of a ring. Reading what others have not committed yet is never needed here; refusing to
 * read holes is not possible through a mount, so that a ring with that flag is not made. */
#define HF3FS_IOR_ALLOW_READ_UNCOMMITTED 1
#define HF3FS_IOR_FORBID_READ_HOLES 2

#define HF3FS_PATH_MAX 256 /* bytes of a mount point with its end */

/* A buffer. Filled by the functions below; programs read base and size. */
struct hf3fs_iov {
  uint8_t *base;
  void *iovh; /* NULL: nothing to destroy */
  char id[16];
  char mount_point[HF3FS_PATH_MAX];
  size_t size;       /* bytes */
  size_t block_size; /* bytes, 0: one block */
  int numa;
};

/* A ring of I/O in one direction. */
struct hf3fs_ior {
  struct hf3fs_iov iov;
  void *iorh; /* NULL: nothing to destroy */
  char mount_point[HF3FS_PATH_MAX];
  bool for_read;
  int io_depth;
  int priority;
  int timeout; /* milliseconds */
  uint64_t flags;
};

/* One finished I/O. */
struct hf3fs_cqe {
  int32_t index; /* what hf3fs_prep_io returned */
  int32_t reserved;
  int64_t result; /* bytes, short only at the end of the file; or -errno */
  const void *userdata;
};

enum hf3fs_mem_type { HF3FS_MEM_HOST = 0, HF3FS_MEM_DEVICE = 1, HF3FS_MEM_MANAGED = 2 };

/* Is the open file fd on a mount that this library serves? */
bool hf3fs_is_hf3fs(int fd);

/* Writes the mount point of an existing path and returns its length + 1; writes nothing if that is
 * more than size bytes. -1: the path is not on such a mount, or does not exist. */
int hf3fs_extract_mount_point(char *hf3fs_mount_point, int size, const char *path);

/* Makes a buffer in shared memory: the mount's daemon's, if it has rings, which is the fastest way
 * for I/O; else in /dev/shm. -EINVAL: bad argument; -ENOENT: not a mount; -EIO: not enough
 * shared memory. */
int hf3fs_iovcreate(struct hf3fs_iov *iov, const char *hf3fs_mount_point, size_t size,
                    size_t block_size, int numa);
/* Maps the buffer of another process by its 16 bytes of id. -ENOENT: there is none; -EINVAL: it is
 * no shared memory, or smaller than size. */
int hf3fs_iovopen(struct hf3fs_iov *iov, const uint8_t id[16], const char *hf3fs_mount_point,
                  size_t size, size_t block_size, int numa);
/* Takes the name of the memory away: nobody opens it any more, who has it mapped goes on. */
void hf3fs_iovunlink(struct hf3fs_iov *iov);
/* Ends a buffer; nothing happens for a wrapped one and for one that has ended. Finish its I/O, or
 * destroy its rings, before. */
void hf3fs_iovdestroy(struct hf3fs_iov *iov);
/* Describes memory of the caller's as a buffer. It stays the caller's. */
int hf3fs_iovwrap(struct hf3fs_iov *iov, void *base, const uint8_t id[16],
                  const char *hf3fs_mount_point, size_t size, size_t block_size, int numa);

/* Bytes that a ring for so many entries takes. */
size_t hf3fs_ior_size(int entries);
/* Make a ring for up to `entries` I/Os that are prepared and not reaped. io_depth, timeout (ms) and
 * numa are accepted; every submitted I/O starts at once. priority: below 0 before others, above 0
 * after them. -EINVAL: bad argument; -ENOENT: not a mount. */
int hf3fs_iorcreate(struct hf3fs_ior *ior, const char *hf3fs_mount_point, int entries,
                    bool for_read, int io_depth, int numa);
int hf3fs_iorcreate2(struct hf3fs_ior *ior, const char *hf3fs_mount_point, int entries,
                     bool for_read, int io_depth, int priority, int numa);
int hf3fs_iorcreate3(struct hf3fs_ior *ior, const char *hf3fs_mount_point, int entries,
                     bool for_read, int io_depth, int priority, int timeout, int numa);
int hf3fs_iorcreate4(struct hf3fs_ior *ior, const char *hf3fs_mount_point, int entries,
                     bool for_read, int io_depth, int timeout, int numa, uint64_t flags);
/* Ends a ring: what has not started never does, what has is waited for. */
void hf3fs_iordestroy(struct hf3fs_ior *ior);

/* Registers an open file. Success is 0 or less: minus a second handle, which works as well as fd.
 * Above 0: errno. EBADF: not open or not on a mount of ours; EINVAL: registered already. */
int hf3fs_reg_fd(int fd, uint64_t flags);
/* Call it before close(). I/O under way is not disturbed; unknown descriptors are ignored. */
void hf3fs_dereg_fd(int fd);

int hf3fs_io_entries(const struct hf3fs_ior *ior);
/* Notes one I/O between [ptr, ptr + len) of iov and the file at offset off; returns its index.
 * One thread at a time per ring. -EINVAL: bad argument, direction or range; -EBADF: not registered;
 * -EACCES: not opened for that; -EAGAIN: the ring is full, reap first. */
int hf3fs_prep_io(const struct hf3fs_ior *ior, const struct hf3fs_iov *iov, bool read, void *ptr,
                  int fd, size_t off, uint64_t len, const void *userdata);
/* Starts what was prepared. */
int hf3fs_submit_ios(const struct hf3fs_ior *ior);
/* Waits for min_results results (at most cqec) and returns how many it wrote to cqes, in the order
 * of their completion. abs_timeout is a time of CLOCK_REALTIME, NULL is for ever; a time that has
 * passed means not to wait. -EINVAL: bad argument. */
int hf3fs_wait_for_ios(const struct hf3fs_ior *ior, struct hf3fs_cqe *cqes, int cqec,
                       int min_results, const struct timespec *abs_timeout);

/* Gives a file a second name; 0 or errno (positive). */
int hf3fs_hardlink(const char *target, const char *link_name);
/* Makes n ranges [start, end) of an open file read as zeros, its length stays; 0 or errno
 * (positive). EINVAL: bad ranges or more than 1000. */
int hf3fs_punchhole(int fd, int n, const size_t *start, const size_t *end, size_t flags);

/* Memory of GPUs is not supported: nothing is available, making a buffer is -ENOTSUP. */
bool hf3fs_gdr_available(void);
int hf3fs_gdr_device_count(void);
int hf3fs_iovcreate_device(struct hf3fs_iov *iov, const char *hf3fs_mount_point, size_t size,
                           size_t block_size, int device_id);
int hf3fs_iovopen_device(struct hf3fs_iov *iov, const uint8_t id[16],
                         const char *hf3fs_mount_point, size_t size, size_t block_size,
                         int device_id);
int hf3fs_iovwrap_device(struct hf3fs_iov *iov, void *device_ptr, const uint8_t id[16],
                         const char *hf3fs_mount_point, size_t size, size_t block_size,
                         int device_id);
enum hf3fs_mem_type hf3fs_iov_mem_type(const struct hf3fs_iov *iov);
int hf3fs_iov_device_id(const struct hf3fs_iov *iov);
int hf3fs_iovsync(const struct hf3fs_iov *iov, int direction);

#ifdef __cplusplus
}
#endif
#endif
