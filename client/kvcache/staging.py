"""Shared memory of this client that blocks pass through, in few sizes.

The pool keeps little idle memory. With a size class for every length it would give memory back and
take new one all the time, which costs more than the copy.
"""

from emberfs.client.chunkread import part_of
from emberfs.client.kvcache.slots import RUN_BYTES_MAX
from emberfs.client.lending import Lender
from emberfs.fabric.region import Buffer
from emberfs.proto.ids import KiB, MiB

STAGING_BYTES = 256 * MiB
_SIZES = (128 * KiB, 512 * KiB, RUN_BYTES_MAX)


class Staging:
    """Lends memory; it comes back when nobody holds the view any more."""

    def __init__(self) -> None:
        self._lender = Lender(STAGING_BYTES)

    def lend(self, size: int) -> tuple[Buffer, memoryview]:
        """Return (buffer for a call, its memory), both of `size` bytes and of undefined content."""
        buffer, view = self._lender.lend(rounded(size))
        return part_of(buffer, 0, size), view[:size]

    def close(self) -> None:
        """Release what is not lent out."""
        self._lender.close()


def rounded(size: int) -> int:
    """What a loan of `size` bytes takes."""
    return next((one for one in _SIZES if size <= one), size)
