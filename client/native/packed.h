/* Entries of a ring (layout.py). Little-endian. */
#ifndef EMBERFS_NATIVE_PACKED_H
#define EMBERFS_NATIVE_PACKED_H
#include <stdint.h>

enum { LENGTH_MAX = 1 << 30 }; /* ENTRY_BYTES_MAX */

struct __attribute__((packed)) entry { /* SUBMISSION */
    uint64_t user_data;
    uint32_t operation, file;
    uint64_t offset;
    uint32_t region, length;
    uint64_t start;
    uint32_t flags;
    char unused[20];
};

struct __attribute__((packed)) completion { /* COMPLETION */
    uint64_t user_data;
    int64_t result;
};

#endif
