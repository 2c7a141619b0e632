/* Which mounts are ours, told by the kernel's mount table: pyfuse3 answers no ioctl. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "internal.h"

#define OURS "fuse.emberfs"
#define THEIRS "fuse.hf3fs"
#define VIRTUAL "3fs-virt"

struct mount {
  unsigned major, minor;
  char *path; /* unescaped, in the line */
  char *kind;
};

/* The table writes blanks and backslashes in octal, see proc_pid_mountinfo(5). */
static void unescape(char *text) {
  char *out = text;
  for (const char *in = text; *in; out++) {
    bool octal = in[0] == '\\' && in[1] >= '0' && in[1] <= '3' && in[2] >= '0' && in[2] <= '7' &&
                 in[3] >= '0' && in[3] <= '7';
    *out = octal ? (char)((in[1] - '0') * 64 + (in[2] - '0') * 8 + (in[3] - '0')) : *in;
    in += octal ? 4 : 1;
  }
  *out = 0;
}

/* id parent major:minor root path options optional... - kind source options */
static bool parse(char *line, struct mount *found) {
  char *rest = strstr(line, " - ");
  if (!rest) return false;
  *rest = 0;
  char *place = NULL;
  char *field = strtok_r(line, " ", &place);
  for (int i = 0; field && i < 4; i++) {
    if (i == 2 && sscanf(field, "%u:%u", &found->major, &found->minor) != 2) return false;
    field = strtok_r(NULL, " ", &place);
  }
  if (!field) return false;
  found->path = field;
  found->kind = strtok_r(rest + 3, " ", &place);
  unescape(found->path);
  return found->kind != NULL;
}

static bool kind_is_served(const char *kind) {
  return strcmp(kind, OURS) == 0 || strcmp(kind, THEIRS) == 0;
}

bool may_skip_file_system_check(void) {
  const char *setting = getenv("HF3FS_USRBIO_DONT_CHECKFS_FOR_MP");
  return setting && strcmp(setting, "yes") == 0;
}

bool is_served(int fd) {
  struct statx status;
  if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, &status) != 0) return false;
  FILE *table = fopen("/proc/self/mountinfo", "re");
  if (!table) return false;
  bool served = false;
  char *line = NULL;
  size_t size = 0;
  while (!served && getline(&line, &size, table) > 0) {
    struct mount mount;
    served = parse(line, &mount) && mount.major == status.stx_dev_major &&
             mount.minor == status.stx_dev_minor && kind_is_served(mount.kind);
  }
  free(line);
  fclose(table);
  return served;
}

static bool contains(const char *directory, const char *path) {
  size_t length = strlen(directory);
  if (length == 1) return true; /* "/" */
  return strncmp(path, directory, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* What 3FS itself mounts is known by its virtual directory, mounted apart or inside. */
static bool accept_virtual(char *directory) {
  char path[PATH_MAX];
  char *name = strrchr(directory, '/');
  if (name && strcmp(name + 1, VIRTUAL) == 0) {
    name[name == directory ? 1 : 0] = 0;
    return true;
  }
  int length = snprintf(path, sizeof path, "%s/" VIRTUAL, directory);
  struct stat found;
  return length > 0 && (size_t)length < sizeof path && lstat(path, &found) == 0;
}

/* The longest accepted mount that holds a canonical path. Another file system mounted inside of it
 * hides it, unless any kind is accepted. */
static bool find_mount(const char *canonical, char best[PATH_MAX]) {
  FILE *table = fopen("/proc/self/mountinfo", "re");
  if (!table) return false;
  bool any_kind = may_skip_file_system_check();
  bool served = false;
  char *line = NULL;
  size_t size = 0;
  best[0] = 0;
  while (getline(&line, &size, table) > 0) {
    struct mount mount;
    if (!parse(line, &mount) || strlen(mount.path) >= PATH_MAX) continue;
    bool accepted = false;
    if (strcmp(mount.kind, OURS) == 0) {
      accepted = contains(mount.path, canonical);
    } else if (any_kind || strcmp(mount.kind, THEIRS) == 0) {
      char *name = strrchr(mount.path, '/');
      bool apart = name && strcmp(name + 1, VIRTUAL) == 0;
      accepted = (apart || contains(mount.path, canonical)) && accept_virtual(mount.path) &&
                 contains(mount.path, canonical);
    }
    if (!accepted && (any_kind || !contains(mount.path, canonical))) continue;
    if (strlen(mount.path) < strlen(best)) continue;
    strcpy(best, mount.path); /* a later line with the same path lies on top of it */
    served = accepted;
  }
  free(line);
  fclose(table);
  return served;
}

EXPORTED int hf3fs_extract_mount_point(char *mount_point, int size, const char *path) {
  char canonical[PATH_MAX], best[PATH_MAX];
  if (!path || !realpath(path, canonical) || !find_mount(canonical, best)) return -1;
  int needed = (int)strlen(best) + 1;
  if (mount_point && needed <= size) memcpy(mount_point, best, (size_t)needed);
  return needed;
}

EXPORTED bool hf3fs_is_hf3fs(int fd) { return is_served(fd); }

int check_mount_point(const char *mount_point) {
  if (!mount_point || !*mount_point || strlen(mount_point) >= HF3FS_PATH_MAX) return -EINVAL;
  if (may_skip_file_system_check()) return access(mount_point, F_OK) == 0 ? 0 : -errno;
  return hf3fs_extract_mount_point(NULL, 0, mount_point) > 0 ? 0 : -ENOENT;
}
