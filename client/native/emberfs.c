/* The C client of rings; see emberfs.h, and layout.py and messages.py for what is shared and said.
 *
 * One file, libc only. Memory and bells are made by the daemon and arrive with its answers.
 */
#define _GNU_SOURCE
#include "emberfs.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef PUBLIC /* who compiles this into a library of its own may hide the names */
#define PUBLIC __attribute__((visibility("default")))
#endif

enum { VERSION = 1, HELLO = 1, REGION, FORGET_REGION, FILE_, FORGET_FILE, RING, FORGET_RING };
enum { SQ_TAIL = 64, SLEEPS = 192, CQ_TAIL = 256, CQ_HEAD = 320, WAITS = 384, WANT = 388 };
enum { HEADER_BYTES = 4096, MESSAGE_BYTES_MAX = 1024, ANSWER_TIMEOUT_S = 30 };
enum { SPIN_NS_MAX = 50000, SECOND_NS = 1000000000 };
static const char socket_name[] = "/.emberfs/ring";

struct request {
    uint32_t kind, reserved;
    uint64_t first, second;
};
struct answer {
    int32_t error;
    uint32_t reserved;
    uint64_t value;
};
struct submission {
    uint64_t user_data;
    uint32_t operation, file;
    uint64_t offset;
    uint32_t region, length;
    uint64_t region_offset;
    uint32_t flags, reserved[5];
};
_Static_assert(sizeof(struct submission) == 64, "see layout.py");
_Static_assert(sizeof(struct emberfs_completion) == 16, "see layout.py");

struct emberfs {
    int socket;
    pthread_mutex_t lock;
};

struct emberfs_ring {
    struct emberfs *connection;
    uint8_t *memory;
    size_t bytes;
    struct submission *submissions;
    struct emberfs_completion *completions;
    uint64_t number;
    int bell;
    uint32_t entries, prepared, submitted;
    _Atomic uint32_t seen;
    int64_t usual_ns; /* how long a wait takes */
};

static __thread char reason[MESSAGE_BYTES_MAX];

static int fail(int error, const char *words) {
    snprintf(reason, sizeof reason, "%s (%s)", words, strerror(error));
    return -error;
}

PUBLIC const char *emberfs_reason(void) { return reason; }

/* ------------------------------------------------------------ asking the daemon */

/* Receive an answer with `count` descriptors; what else came is closed. */
static int receive(struct emberfs *c, struct answer *answer, int *fds, int count) {
    char message[MESSAGE_BYTES_MAX];
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(2 * sizeof(int))];
    } control;
    struct iovec part = {message, sizeof message};
    struct msghdr into = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                          .msg_controllen = sizeof control};
    ssize_t length;
    do length = recvmsg(c->socket, &into, MSG_CMSG_CLOEXEC);
    while (length < 0 && errno == EINTR);
    if (length < (ssize_t)sizeof *answer) {
        int error = length < 0 && errno == EAGAIN ? ETIMEDOUT : ENOTCONN;
        shutdown(c->socket, SHUT_RDWR); /* an answer that comes late is nobody's */
        return fail(error, "the client daemon does not answer");
    }
    int got[2], came = 0;
    struct cmsghdr *header = CMSG_FIRSTHDR(&into);
    if (header != NULL && header->cmsg_type == SCM_RIGHTS) {
        came = (int)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(got, CMSG_DATA(header), (size_t)came * sizeof(int));
    }
    memcpy(answer, message, sizeof *answer);
    int error = answer->error;
    if (error != 0) {
        snprintf(reason, sizeof reason, "%.*s", (int)(length - (ssize_t)sizeof *answer),
                 message + sizeof *answer);
        error = -error;
    } else if (came != count) {
        error = fail(EMFILE, "a descriptor did not arrive");
    }
    for (int i = 0; i < came; i++) {
        if (error == 0) fds[i] = got[i];
        else close(got[i]);
    }
    return error;
}

static int ask(struct emberfs *c, uint32_t kind, uint64_t first, uint64_t second, uint64_t *value,
               int *fds, int count) {
    struct request request = {kind, 0, first, second};
    struct answer answer = {0};
    pthread_mutex_lock(&c->lock);
    int error = 0;
    if (send(c->socket, &request, sizeof request, MSG_NOSIGNAL) != sizeof request)
        error = fail(ENOTCONN, "the client daemon is gone; open files and rings anew");
    else
        error = receive(c, &answer, fds, count);
    pthread_mutex_unlock(&c->lock);
    if (value != NULL) *value = answer.value;
    return error;
}

/* The socket of the mount that `path` is on: the link below it, or below a directory above it. */
static int find_socket(const char *path, char *found, size_t room) {
    char place[PATH_MAX + sizeof socket_name];
    if (realpath(path, place) == NULL) return fail(errno, path);
    for (size_t length = strlen(place);; length--) {
        if (place[length] != '/' && place[length] != '\0') continue;
        place[length] = '\0';
        memcpy(place + length, socket_name, sizeof socket_name);
        ssize_t size = readlink(place, found, room - 1);
        if (size > 0) {
            found[size] = '\0';
            return 0;
        }
        if (length == 0) return fail(ENOENT, "not on an emberfs mount with rings");
        place[length] = '\0';
    }
}

PUBLIC int emberfs_connect(const char *path, struct emberfs **connection) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (path == NULL || connection == NULL) return fail(EINVAL, "no path or no place");
    int error = find_socket(path, address.sun_path, sizeof address.sun_path);
    if (error != 0) return error;
    struct emberfs *c = calloc(1, sizeof *c);
    if (c == NULL) return fail(ENOMEM, "a connection");
    pthread_mutex_init(&c->lock, NULL);
    c->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    struct timeval patience = {ANSWER_TIMEOUT_S, 0};
    uint64_t version = 0;
    if (c->socket < 0) error = fail(errno, "socket");
    else if (setsockopt(c->socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) < 0 ||
             connect(c->socket, (struct sockaddr *)&address, sizeof address) < 0)
        error = fail(errno, address.sun_path);
    else error = ask(c, HELLO, VERSION, 0, &version, NULL, 0);
    if (error == 0 && version != VERSION) error = fail(EPROTO, "the daemon speaks another version");
    if (error != 0) emberfs_disconnect(c);
    else *connection = c;
    return error;
}

PUBLIC void emberfs_disconnect(struct emberfs *c) {
    if (c == NULL) return;
    if (c->socket >= 0) close(c->socket);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

/* ------------------------------------------------------------ memory and files */

PUBLIC int emberfs_region_create(struct emberfs *c, size_t bytes, void *at,
                                 struct emberfs_region *region) {
    uint64_t number;
    int fd;
    long page = sysconf(_SC_PAGESIZE);
    if (c == NULL || region == NULL || bytes == 0 || (uintptr_t)at % (size_t)page != 0)
        return fail(EINVAL, "no connection, size or place, or not at a page");
    int error = ask(c, REGION, bytes, 0, &number, &fd, 1);
    if (error != 0) return error;
    size_t whole = (bytes + (size_t)page - 1) / (size_t)page * (size_t)page;
    int flags = MAP_SHARED | (at != NULL ? MAP_FIXED : 0);
    void *base = mmap(at, whole, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (base == MAP_FAILED) {
        error = fail(errno, "mmap");
        close(fd);
        ask(c, FORGET_REGION, number, 0, NULL, NULL, 0);
        return error;
    }
    *region = (struct emberfs_region){base, whole, (uint32_t)number, fd};
    return 0;
}

PUBLIC void emberfs_region_destroy(struct emberfs *c, struct emberfs_region *region, int keep) {
    if (region == NULL || region->base == NULL) return;
    ask(c, FORGET_REGION, region->number, 0, NULL, NULL, 0);
    if (!keep) munmap(region->base, region->bytes);
    close(region->fd);
    region->base = NULL;
}

PUBLIC int64_t emberfs_file_register(struct emberfs *c, int fd) {
    uint64_t number;
    if (c == NULL || fd < 0) return fail(EBADF, "no connection or no descriptor");
    int error = ask(c, FILE_, (uint64_t)fd, 0, &number, NULL, 0);
    return error != 0 ? error : (int64_t)number;
}

PUBLIC int emberfs_file_forget(struct emberfs *c, int64_t file) {
    if (c == NULL || file <= 0) return fail(EBADF, "no connection or no file");
    return ask(c, FORGET_FILE, (uint64_t)file, 0, NULL, NULL, 0);
}

/* ------------------------------------------------------------ rings */

static _Atomic uint32_t *word(const struct emberfs_ring *r, size_t at) {
    return (_Atomic uint32_t *)(r->memory + at);
}

static uint32_t load(const struct emberfs_ring *r, size_t at) {
    return atomic_load_explicit(word(r, at), memory_order_acquire);
}

/* Store a word, and only then look at another. */
static uint32_t store_then_load(const struct emberfs_ring *r, size_t at, uint32_t value,
                                size_t look) {
    atomic_store_explicit(word(r, at), value, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    return load(r, look);
}

PUBLIC int emberfs_ring_create(struct emberfs *c, const struct emberfs_terms *terms,
                               struct emberfs_ring **ring) {
    if (c == NULL || terms == NULL || ring == NULL) return fail(EINVAL, "no connection or terms");
    uint64_t entries = terms->entries ? terms->entries : 256, number;
    if (terms->priority < -1 || terms->priority > 1) return fail(EINVAL, "priority -1, 0 or 1");
    int fds[2];
    int error = ask(c, RING, entries | (uint64_t)(terms->priority + 1) << 32,
                    terms->depth | (uint64_t)terms->gather_us << 32, &number, fds, 2);
    if (error != 0) return error;
    struct emberfs_ring *r = calloc(1, sizeof *r);
    size_t bytes = HEADER_BYTES + entries * (sizeof(struct submission) + 16);
    void *memory = MAP_FAILED;
    if (r != NULL) memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    error = errno;
    close(fds[0]);
    if (memory == MAP_FAILED) {
        free(r);
        close(fds[1]);
        ask(c, FORGET_RING, number, 0, NULL, NULL, 0);
        return fail(error, "memory for a ring");
    }
    *r = (struct emberfs_ring){.connection = c, .memory = memory, .bytes = bytes,
                               .number = number, .bell = fds[1], .entries = (uint32_t)entries,
                               .usual_ns = SPIN_NS_MAX};
    r->submissions = (struct submission *)(r->memory + HEADER_BYTES);
    r->completions = (struct emberfs_completion *)(r->submissions + entries);
    *ring = r;
    return 0;
}

PUBLIC void emberfs_ring_destroy(struct emberfs_ring *r) {
    if (r == NULL) return;
    ask(r->connection, FORGET_RING, r->number, 0, NULL, NULL, 0);
    munmap(r->memory, r->bytes);
    close(r->bell);
    free(r);
}

PUBLIC unsigned emberfs_ring_entries(const struct emberfs_ring *r) { return r->entries; }

PUBLIC int emberfs_prepare(struct emberfs_ring *r, enum emberfs_operation operation, int64_t file,
                           uint64_t offset, const struct emberfs_region *region, void *memory,
                           uint32_t bytes, uint64_t user_data) {
    if (r == NULL || region == NULL || file <= 0 || bytes == 0 || offset > INT64_MAX)
        return fail(EINVAL, "no ring, region, file or bytes");
    uintptr_t start = (uintptr_t)memory - (uintptr_t)region->base;
    if ((uintptr_t)memory < (uintptr_t)region->base || start > region->bytes ||
        bytes > region->bytes - start)
        return fail(EINVAL, "the memory is not in the region");
    if (r->prepared - atomic_load_explicit(&r->seen, memory_order_acquire) >= r->entries)
        return fail(EAGAIN, "the ring is full");
    r->submissions[r->prepared % r->entries] = (struct submission){
        .user_data = user_data, .operation = operation, .file = (uint32_t)file, .offset = offset,
        .region = region->number, .length = bytes, .region_offset = start};
    r->prepared++;
    return 0;
}

PUBLIC int emberfs_submit(struct emberfs_ring *r) {
    if (r == NULL) return fail(EINVAL, "no ring");
    uint32_t count = r->prepared - r->submitted;
    if (count == 0) return 0;
    r->submitted = r->prepared;
    if (store_then_load(r, SQ_TAIL, r->submitted, SLEEPS) != 0) {
        char bell = 1; /* a full socket wakes as well, and a daemon that is gone shows in waiting */
        if (send(r->bell, &bell, 1, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) return (int)count;
    }
    return (int)count;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * SECOND_NS + now.tv_nsec;
}

static uint32_t ready(const struct emberfs_ring *r) { return load(r, CQ_TAIL) - r->seen; }

/* Wait for `min` completions; spins first if they usually come that soon. */
static int await(struct emberfs_ring *r, uint32_t min, int64_t end_ns) {
    int64_t began_ns = now_ns();
    if (r->usual_ns < SPIN_NS_MAX)
        while (ready(r) < min && now_ns() - began_ns < 2 * r->usual_ns)
            ;
    int error = 0;
    while (ready(r) < min && error == 0) {
        atomic_store_explicit(word(r, WANT), r->seen + min, memory_order_relaxed);
        if (store_then_load(r, WAITS, 1, CQ_TAIL) - r->seen >= min) break;
        int64_t left_ns = end_ns < 0 ? -1 : end_ns - now_ns();
        if (end_ns >= 0 && left_ns <= 0) break;
        struct pollfd bell = {.fd = r->bell, .events = POLLIN};
        struct timespec left = {left_ns / SECOND_NS, left_ns % SECOND_NS};
        if (ppoll(&bell, 1, end_ns < 0 ? NULL : &left, NULL) > 0) {
            char rings[64];
            if (recv(r->bell, rings, sizeof rings, MSG_DONTWAIT) == 0)
                error = fail(ENOTCONN, "the client daemon is gone; open files and rings anew");
        }
    }
    store_then_load(r, WAITS, 0, CQ_TAIL);
    r->usual_ns = (3 * r->usual_ns + now_ns() - began_ns) / 4;
    return error;
}

PUBLIC int emberfs_wait(struct emberfs_ring *r, struct emberfs_completion *completions,
                        unsigned max, unsigned min, const struct timespec *timeout) {
    if (r == NULL || completions == NULL || max == 0) return fail(EINVAL, "no ring or no room");
    uint32_t wanted = min < max ? min : max;
    if (wanted > r->entries) wanted = r->entries;
    int64_t end_ns = -1;
    if (timeout != NULL) end_ns = now_ns() + timeout->tv_sec * SECOND_NS + timeout->tv_nsec;
    int error = ready(r) < wanted ? await(r, wanted, end_ns) : 0;
    uint32_t count = ready(r), seen = r->seen;
    if (count > max) count = max;
    if (count == 0 && error != 0) return error;
    for (uint32_t i = 0; i < count; i++) completions[i] = r->completions[(seen + i) % r->entries];
    atomic_store_explicit(&r->seen, seen + count, memory_order_release);
    if (count != 0) store_then_load(r, CQ_HEAD, seen + count, CQ_TAIL);
    return (int)count;
}
