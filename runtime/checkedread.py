"""Reads of what is in the page cache, compared with checksums: a batch in one compiled call.

A Python loop costs several times what the reads of 4 KiB themselves do.
"""

import errno
import os
from collections.abc import Sequence
from typing import TypeAlias

from emberfs.runtime._native import read_checked as _native
from emberfs.runtime.checksum import crc32c_blocks_twin

# Descriptor, offset in the file; CRC32C of blocks (packed u32), the byte of it where those of this
# read begin, bytes per block; where the data goes, which says how much is read.
CheckedRead: TypeAlias = tuple[int, int, bytes, int, int, memoryview]

DONE, NOT_CACHED, DIFFERENT, FAILED = range(4)  # what became of a read


def read_checked(reads: Sequence[CheckedRead]) -> bytes:
    """Fill every sink; one byte for each read: DONE, NOT_CACHED, DIFFERENT or FAILED.

    Only after DONE is a sink's content of any use. Releases the GIL once for all.
    """
    return _native(reads)


def read_checked_twin(reads: Sequence[CheckedRead]) -> bytes:
    """Do the same in Python: the oracle of its test."""
    return bytes(map(_read, reads))


def _read(read: CheckedRead) -> int:
    fd, offset, sums, first, block_bytes, sink = read
    try:
        count = os.preadv(fd, [sink], offset, os.RWF_NOWAIT)
    except OSError as problem:
        return NOT_CACHED if problem.errno in (errno.EAGAIN, errno.EOPNOTSUPP) else FAILED
    if count != len(sink):
        return NOT_CACHED
    found = crc32c_blocks_twin(sink, block_bytes)
    return DONE if found == sums[first : first + len(found)] else DIFFERENT
