/* A source or sink as a frame describes it (frame.py). Little-endian. */
#ifndef EMBERFS_FABRIC_PACKED_H
#define EMBERFS_FABRIC_PACKED_H
#include <stdint.h>

enum { STREAMED = 0 }; /* the region of what travels in the stream itself */

struct __attribute__((packed)) descriptor {
    uint32_t region;
    uint64_t offset;
    uint32_t bytes;
};

#endif
