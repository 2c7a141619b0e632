"""A ring in shared memory: where everything lies, and who writes it.

One memfd holds a header of a page, the submission entries and the completion entries. All numbers
are little-endian. Indices are u32 that only rise and wrap around; `index % entries` is the place.

    at    bytes  writer       what
    0     8      daemon       MAGIC
    8     4      daemon       entries, a power of two
    64    4      application  SQ_TAIL   how many entries it has submitted
    128   4      daemon       SQ_HEAD   how many of them were taken: their places are free
    192   4      daemon       SLEEPS    1: ring the bell when SQ_TAIL moves
    256   4      daemon       CQ_TAIL   how many entries are complete
    320   4      application  CQ_HEAD   how many of them were seen
    384   4      application  WAITS     1: ring the bell when CQ_TAIL has come to WANT
    388   4      application  WANT
    4096                      submission entries, 64 bytes each
    ...                       completion entries, 16 bytes each

Who sets a flag looks at the other's index afterwards, and who moves an index looks at the other's
flag afterwards, each with a full fence in between: so one of them sees the other. The daemon
believes nothing of it: it copies an entry once, checks the copy, and keeps its own indices.
"""

import struct
from typing import TypeAlias

MAGIC = 0x31474E4952424D45  # "EMBRING1"
MAGIC_AT, ENTRIES_AT = 0, 8
SQ_TAIL, SQ_HEAD, SLEEPS = 64, 128, 192
CQ_TAIL, CQ_HEAD, WAITS, WANT = 256, 320, 384, 388
HEADER_BYTES = 4096

ENTRIES_MAX = 1 << 15
ENTRY_BYTES_MAX = 1 << 30  # what one entry may read or write

READ, WRITE = 0, 1  # operations

# user data, operation, file, offset in the file, region, length, offset in the region, flags (0)
SUBMISSION = struct.Struct("<QIIQIIQI20x")
COMPLETION = struct.Struct("<Qq")  # user data, bytes or -errno
WORD = struct.Struct("<I")
START = struct.Struct("<QI")

WRAP = 1 << 32


# An entry as it is unpacked: user data, operation, file and offset in it, region and bytes, offset
# in the region, flags.
Submission: TypeAlias = tuple[int, int, int, int, int, int, int, int]


_REGION = struct.Struct("<IQ")


def region_facts(region_id: int, size_bytes: int) -> bytes:
    """What compiled code has to know of memory: its id in this process, and its size."""
    return _REGION.pack(region_id, size_bytes)


def count_of(entries: bytes | memoryview) -> int:
    """How many submission entries these are."""
    return len(entries) // SUBMISSION.size


def completions_at(entries: int) -> int:
    """Where the completion entries begin."""
    return HEADER_BYTES + entries * SUBMISSION.size


def ring_bytes(entries: int) -> int:
    """Size of the memory of a ring of so many entries."""
    return completions_at(entries) + entries * COMPLETION.size


def runs(index: int, count: int, entries: int) -> list[tuple[int, int]]:
    """The places of `count` entries from an index on: (first, count) once or, wrapped, twice."""
    first = index % entries
    before_end = min(count, entries - first)
    if before_end == count:
        return [(first, count)] if count else []
    return [(first, before_end), (0, count - before_end)]
