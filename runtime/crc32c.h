/* CRC32C (Castagnoli, RFC 3720) of a run of blocks.
 *
 * Four streams are computed side by side: the crc32 instruction has a latency of three cycles and a
 * throughput of one, so a single chain would leave two thirds of the unit idle. The Python twin in
 * runtime/checksum.py is the oracle of the test. For one file each: everything is static.
 */
#include <stdint.h>
#include <string.h>

static uint32_t table[256];

static void fill_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) value = value & 1 ? value >> 1 ^ 0x82F63B78u : value >> 1;
        table[i] = value;
    }
}

static void blocks_portable(const uint8_t *data, size_t bytes, size_t block, uint32_t *out) {
    for (size_t at = 0; at < bytes; at += block) {
        size_t stop = bytes - at < block ? bytes : at + block;
        uint32_t crc = ~0u;
        for (size_t i = at; i < stop; i++) crc = table[(crc ^ data[i]) & 0xFF] ^ crc >> 8;
        *out++ = ~crc;
    }
}

#if defined(__x86_64__)
#include <nmmintrin.h>

/* What a checksum becomes when LANE zero bytes follow, by each byte of it. */
enum { LANE = 1024 };
static uint32_t after_lane[4][256];

static void fill_lanes(void) {
    uint32_t of_bit[32]; /* it is linear: the rest follows from single bits */
    for (int bit = 0; bit < 32; bit++) {
        uint32_t crc = 1u << bit;
        for (int i = 0; i < LANE; i++) crc = table[crc & 0xFF] ^ crc >> 8;
        of_bit[bit] = crc;
    }
    for (int byte = 0; byte < 4; byte++)
        for (int value = 0; value < 256; value++) {
            uint32_t sum = 0;
            for (int bit = 0; bit < 8; bit++)
                if (value >> bit & 1) sum ^= of_bit[8 * byte + bit];
            after_lane[byte][value] = sum;
        }
}

static uint32_t over_lane(uint32_t crc) {
    return after_lane[0][crc & 0xFF] ^ after_lane[1][crc >> 8 & 0xFF] ^
           after_lane[2][crc >> 16 & 0xFF] ^ after_lane[3][crc >> 24];
}

__attribute__((target("sse4.2")))
static uint32_t one_block(const uint8_t *data, size_t bytes) {
    uint64_t crc = ~0u, word;
    for (; bytes >= 8; bytes -= 8, data += 8) {
        memcpy(&word, data, 8);
        crc = _mm_crc32_u64(crc, word);
    }
    uint32_t tail = (uint32_t)crc;
    while (bytes--) tail = _mm_crc32_u8(tail, *data++);
    return ~tail;
}

/* Four runs of `bytes` (a multiple of 8) that follow each other, side by side. */
__attribute__((target("sse4.2")))
static void four(const uint8_t *data, size_t bytes, uint32_t *crcs) {
    uint64_t a = crcs[0], b = crcs[1], c = crcs[2], d = crcs[3], w, x, y, z;
    for (size_t i = 0; i < bytes; i += 8) {
        memcpy(&w, data + i, 8);
        memcpy(&x, data + bytes + i, 8);
        memcpy(&y, data + 2 * bytes + i, 8);
        memcpy(&z, data + 3 * bytes + i, 8);
        a = _mm_crc32_u64(a, w);
        b = _mm_crc32_u64(b, x);
        c = _mm_crc32_u64(c, y);
        d = _mm_crc32_u64(d, z);
    }
    crcs[0] = (uint32_t)a;
    crcs[1] = (uint32_t)b;
    crcs[2] = (uint32_t)c;
    crcs[3] = (uint32_t)d;
}

/* A block alone, which is most small reads: as four lanes, put together. */
static uint32_t four_lanes(const uint8_t *data) {
    uint32_t crcs[4] = {~0u, 0, 0, 0};
    four(data, LANE, crcs);
    return ~(over_lane(over_lane(over_lane(crcs[0]) ^ crcs[1]) ^ crcs[2]) ^ crcs[3]);
}

static void blocks_fast(const uint8_t *data, size_t bytes, size_t block, uint32_t *out) {
    size_t at = 0;
    if (block % 8 == 0) {
        for (; bytes - at >= 4 * block; at += 4 * block, out += 4) {
            out[0] = out[1] = out[2] = out[3] = ~0u;
            four(data + at, block, out);
            for (int i = 0; i < 4; i++) out[i] = ~out[i];
        }
    }
    for (; at < bytes; at += block) {
        size_t size = bytes - at < block ? bytes - at : block;
        *out++ = size == 4 * LANE ? four_lanes(data + at) : one_block(data + at, size);
    }
}

static int have_fast(void) { return __builtin_cpu_supports("sse4.2"); }
#else
#define blocks_fast blocks_portable
static void fill_lanes(void) {}
static int have_fast(void) { return 0; }
#endif

static void blocks(const void *data, size_t bytes, size_t block, uint32_t *out) {
    if (have_fast())
        blocks_fast(data, bytes, block, out);
    else
        blocks_portable(data, bytes, block, out);
}

/* Before anything else. */
static void crc32c_begin(void) {
    fill_table();
    fill_lanes();
}
