/* A C program on rings, as test_rings_c.py runs it: ring_program FILE TOTAL_BYTES.
 *
 * The file holds the bytes i * 131 mod 251. Prints "ok", or where it is wrong.
 */
#include <emberfs.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "line %d: %s: %s\n", __LINE__, #condition, emberfs_reason()); \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

enum { BLOCK = 4096, COUNT = 1000 };

static unsigned char byte_at(size_t i) { return (unsigned char)(i * 131 % 251); }

static void read_blocks(struct emberfs *daemon, int64_t file, size_t total) {
    struct emberfs_terms terms = {.entries = 64};
    struct emberfs_ring *ring;
    struct emberfs_region memory;
    CHECK(emberfs_ring_create(daemon, &terms, &ring) == 0);
    CHECK(emberfs_ring_entries(ring) == 64);
    CHECK(emberfs_region_create(daemon, (size_t)BLOCK * COUNT, NULL, &memory) == 0);
    char *base = memory.base;
    size_t offsets[COUNT];
    unsigned sent = 0, done = 0;
    while (done < COUNT) {
        while (sent < COUNT) {
            offsets[sent] = (size_t)rand() % (total - BLOCK);
            int error = emberfs_prepare(ring, EMBERFS_READ, file, offsets[sent], &memory,
                                        base + (size_t)sent * BLOCK, BLOCK, sent);
            if (error == -EAGAIN) break;
            CHECK(error == 0);
            sent++;
        }
        CHECK(emberfs_submit(ring) >= 0);
        struct emberfs_completion found[16];
        struct timespec patience = {20, 0};
        int count = emberfs_wait(ring, found, 16, 1, &patience);
        CHECK(count > 0);
        for (int i = 0; i < count; i++, done++) {
            CHECK(found[i].result == BLOCK);
            size_t n = found[i].user_data;
            for (size_t j = 0; j < BLOCK; j++)
                CHECK((unsigned char)base[n * BLOCK + j] == byte_at(offsets[n] + j));
        }
    }
    struct timespec moment = {0, 1000};
    struct emberfs_completion none;
    CHECK(emberfs_wait(ring, &none, 1, 1, &moment) == 0);
    emberfs_ring_destroy(ring);
    emberfs_region_destroy(daemon, &memory, 0);
}

static struct emberfs *shared;
static int64_t shared_file;
static size_t shared_total;

static void *in_a_thread(void *unused) {
    read_blocks(shared, shared_file, shared_total);
    return unused;
}

static void errors(struct emberfs *daemon, int64_t file, const char *path) {
    struct emberfs_terms terms = {.entries = 3};
    struct emberfs_ring *ring;
    struct emberfs_region memory;
    CHECK(emberfs_ring_create(daemon, &terms, &ring) == -EINVAL);
    CHECK(strstr(emberfs_reason(), "power of two") != NULL);
    terms.entries = 8;
    CHECK(emberfs_ring_create(daemon, &terms, &ring) == 0);
    CHECK(emberfs_region_create(daemon, 1 << 16, (void *)123, &memory) == -EINVAL);
    void *place = mmap(NULL, 1 << 16, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(emberfs_region_create(daemon, 1 << 16, place, &memory) == 0);
    CHECK(memory.base == place);
    CHECK(emberfs_prepare(ring, EMBERFS_READ, file, 0, &memory, (char *)place + 65000, 1000, 0) ==
          -EINVAL);
    CHECK(emberfs_prepare(ring, EMBERFS_WRITE, file, 0, &memory, place, 1000, 7) == 0);
    CHECK(emberfs_prepare(ring, EMBERFS_READ, 99999, 0, &memory, place, 1000, 8) == 0);
    CHECK(emberfs_prepare(ring, EMBERFS_READ, file, 1ull << 40, &memory, place, 1000, 9) == 0);
    CHECK(emberfs_submit(ring) == 3);
    struct emberfs_completion found[8];
    int count = 0;
    while (count < 3) {
        int some = emberfs_wait(ring, found + count, 8 - (unsigned)count, 1, NULL);
        CHECK(some > 0);
        count += some;
    }
    for (int i = 0; i < count; i++) {
        int64_t expected = found[i].user_data == 7 ? -EACCES : found[i].user_data == 8 ? -EBADF : 0;
        CHECK(found[i].result == expected);
    }
    int other = open("/etc/passwd", O_RDONLY);
    CHECK(emberfs_file_register(daemon, other) == -EBADF);
    CHECK(strstr(emberfs_reason(), "not on this mount") != NULL);
    CHECK(emberfs_file_register(daemon, 12345) == -EBADF);
    close(other);
    struct emberfs *nobody;
    CHECK(emberfs_connect("/proc", &nobody) == -ENOENT);
    CHECK(emberfs_connect("/does/not/exist", &nobody) == -ENOENT);

    int fd = open(path, O_RDWR);
    int64_t writable = emberfs_file_register(daemon, fd);
    CHECK(writable > 0);
    memcpy(place, "written", 7);
    CHECK(emberfs_prepare(ring, EMBERFS_WRITE, writable, 3, &memory, place, 7, 1) == 0);
    CHECK(emberfs_submit(ring) == 1);
    CHECK(emberfs_wait(ring, found, 8, 1, NULL) == 1);
    CHECK(found[0].result == 7);
    char back[7];
    CHECK(pread(fd, back, 7, 3) == 7 && memcmp(back, "written", 7) == 0);
    CHECK(emberfs_file_forget(daemon, writable) == 0);
    CHECK(emberfs_file_forget(daemon, writable) == -EINVAL);
    close(fd);
    emberfs_ring_destroy(ring);
    emberfs_region_destroy(daemon, &memory, 1);
    memset(place, 1, 1 << 16); /* kept: still mapped here */
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    struct emberfs *daemon;
    size_t total = strtoul(argv[2], NULL, 10);
    CHECK(emberfs_connect(argv[1], &daemon) == 0);
    int fd = open(argv[1], O_RDONLY);
    int64_t file = emberfs_file_register(daemon, fd);
    CHECK(file > 0);
    read_blocks(daemon, file, total);
    shared = daemon;
    shared_file = file;
    shared_total = total;
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, in_a_thread, NULL) == 0);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < 200; i++) { /* nothing is left behind */
        struct emberfs_region memory;
        struct emberfs_ring *ring;
        struct emberfs_terms terms = {0};
        CHECK(emberfs_region_create(daemon, 1 << 20, NULL, &memory) == 0);
        CHECK(emberfs_ring_create(daemon, &terms, &ring) == 0);
        emberfs_ring_destroy(ring);
        emberfs_region_destroy(daemon, &memory, 0);
    }
    errors(daemon, file, argv[1]);
    close(fd);
    emberfs_disconnect(daemon);
    puts("ok");
    return 0;
}
