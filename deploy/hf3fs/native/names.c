/* Ids of buffers, and where the links that carry them live. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

void make_uuid(uint8_t id[16]) {
  if (getrandom(id, 16, 0) != 16) memset(id, 0, 16); /* a clash is EEXIST, not damage */
  id[6] = (uint8_t)((id[6] & 0x0f) | 0x40);
  id[8] = (uint8_t)((id[8] & 0x3f) | 0x80);
}

void format_uuid(const uint8_t id[16], char text[UUID_TEXT_BYTES]) {
  static const char digits[] = "0123456789abcdef";
  char *out = text;
  for (int i = 0; i < 16; i++) {
    if (i == 4 || i == 6 || i == 8 || i == 10) *out++ = '-';
    *out++ = digits[id[i] >> 4];
    *out++ = digits[id[i] & 15];
  }
  *out = 0;
}

/* Links live where programs of 3FS make and seek them, if that directory exists. Otherwise in one
 * per user beside the memory that they lead to, so that both end with the host's uptime. */
int link_directory(const char *mount_point, bool make, char *path, size_t size) {
  struct stat found;
  int length = snprintf(path, size, "%s/3fs-virt/iovs", mount_point);
  if (length < 0 || (size_t)length >= size) return -ENAMETOOLONG;
  if (stat(path, &found) == 0 && S_ISDIR(found.st_mode)) return 0;
  int problem = check_mount_point(mount_point);
  if (problem) return problem;
  snprintf(path, size, "/dev/shm/emberfs-hf3fs-%u", (unsigned)geteuid());
  if (make && mkdir(path, 0700) != 0 && errno != EEXIST) return -errno;
  if (lstat(path, &found) != 0) return -errno;
  /* /dev/shm is everybody's: a directory that somebody else has put there is not trusted. */
  if (!S_ISDIR(found.st_mode) || found.st_uid != geteuid() || (found.st_mode & 022)) return -EPERM;
  return 0;
}
