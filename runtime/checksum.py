"""CRC32C, of a whole buffer (library) and of a run of blocks (one compiled call).

RFC 3720, polynomial 0x1EDC6F41 reflected. No library checksums a run of blocks in one call that
releases the GIL, and a Python loop over 256 blocks costs as much as reading them.
"""

import sys

from crc32c import crc32c as _crc32c

from emberfs.proto.ids import CHECKSUM_BLOCK_BYTES
from emberfs.runtime._native import crc32c_blocks as _native_blocks

assert sys.byteorder == "little", "checksums are stored as little-endian u32"


def crc32c(data: bytes | memoryview, seed: int = 0) -> int:
    """Return the CRC32C of a buffer, continuing from `seed`."""
    return _crc32c(data, seed)


def crc32c_blocks(data: bytes | memoryview, block_bytes: int = CHECKSUM_BLOCK_BYTES) -> bytes:
    """Return the CRC32C of each block of `data` as packed little-endian u32; the last is short."""
    return _native_blocks(data, block_bytes)


def crc32c_blocks_twin(data: bytes | memoryview, block_bytes: int = CHECKSUM_BLOCK_BYTES) -> bytes:
    """Compute the same as crc32c_blocks in Python: the oracle of its test."""
    view = memoryview(data)
    return b"".join(
        _crc32c(view[at : at + block_bytes]).to_bytes(4, "little")
        for at in range(0, len(view), block_bytes)
    )
