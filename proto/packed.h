/* Operations and results of READ_BATCH as they travel (storage_calls.py). Little-endian. */
#ifndef EMBERFS_PROTO_PACKED_H
#define EMBERFS_PROTO_PACKED_H
#include <stdint.h>

struct __attribute__((packed)) operation { /* ReadOp */
    uint32_t target, chain_version;
    char chunk[12];
    uint32_t offset, length, flags;
};

struct __attribute__((packed)) result { /* ReadResult */
    int32_t code;
    uint32_t length;
    uint64_t version;
};

#endif
