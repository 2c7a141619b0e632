/* Memory of GPUs: programs ask whether there is any, and hear no. */
#define _GNU_SOURCE
#include <errno.h>

#include "internal.h"

EXPORTED bool hf3fs_gdr_available(void) { return false; }

EXPORTED int hf3fs_gdr_device_count(void) { return 0; }

EXPORTED int hf3fs_iovcreate_device(struct hf3fs_iov *iov, const char *mount_point, size_t size,
                                    size_t block_size, int device_id) {
  (void)iov, (void)mount_point, (void)size, (void)block_size, (void)device_id;
  return -ENOTSUP;
}

EXPORTED int hf3fs_iovopen_device(struct hf3fs_iov *iov, const uint8_t id[16],
                                  const char *mount_point, size_t size, size_t block_size,
                                  int device_id) {
  (void)iov, (void)id, (void)mount_point, (void)size, (void)block_size, (void)device_id;
  return -ENOTSUP;
}

EXPORTED int hf3fs_iovwrap_device(struct hf3fs_iov *iov, void *device_ptr, const uint8_t id[16],
                                  const char *mount_point, size_t size, size_t block_size,
                                  int device_id) {
  (void)iov, (void)device_ptr, (void)id, (void)mount_point, (void)size, (void)block_size;
  (void)device_id;
  return -ENOTSUP;
}

EXPORTED enum hf3fs_mem_type hf3fs_iov_mem_type(const struct hf3fs_iov *iov) {
  (void)iov;
  return HF3FS_MEM_HOST;
}

EXPORTED int hf3fs_iov_device_id(const struct hf3fs_iov *iov) {
  (void)iov;
  return -1;
}

/* Memory of the host is always in step. */
EXPORTED int hf3fs_iovsync(const struct hf3fs_iov *iov, int direction) {
  (void)direction;
  return iov ? 0 : -EINVAL;
}
