"""Pooled shared memory lent out as memoryviews that come back by themselves.

Whoever reads a file gets a memoryview without a copy and may hold it as long as he likes; when the
last slice of it is gone, its memory returns to the pool.
"""

import ctypes
import weakref
from collections import deque

from emberfs.fabric.buffers import BufferPool
from emberfs.fabric.region import Buffer, Slice
from emberfs.proto.errors import EmberfsError

_ARRAYS: dict[int, type[ctypes.Array[ctypes.c_ubyte]]] = {}


def _array_of(size: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    found = _ARRAYS.get(size)
    if found is None:
        found = _ARRAYS[size] = ctypes.c_ubyte * size
    return found


class Lender:
    """Lends memory out of a bounded pool; beyond the bound, private memory of the process."""

    def __init__(self, limit_bytes: int) -> None:
        self._pool = BufferPool(limit_bytes)
        # The last reference may be dropped in any thread: appending to a deque is atomic.
        self._returned: deque[Slice] = deque()
        # A reference that calls back costs a third of weakref.finalize; somebody must hold it.
        self._loans: dict[int, tuple[weakref.ref[object], Slice]] = {}  # by id of the reference

    def lend(self, length: int) -> tuple[Buffer, memoryview]:
        """Return (buffer for a fabric call, its memory to hand out), of undefined content.

        The buffer may be used for as long as the memory is held.
        """
        while self._returned:
            self._pool.give(self._returned.popleft())
        try:
            loan = self._pool.take(length)
        except EmberfsError:
            private = memoryview(bytearray(length))
            return private, private
        # All slices of a view share its exporter: one of its own per loan tells when all are gone.
        size = min(1 << max(0, length - 1).bit_length(), loan.region.size_bytes - loan.offset)
        exporter = _array_of(size).from_buffer(loan.region.view, loan.offset)
        reference: weakref.ref[object] = weakref.ref(exporter, self._came_back)
        self._loans[id(reference)] = reference, loan
        return loan, memoryview(exporter).cast("B")[:length]

    def _came_back(self, reference: "weakref.ref[object]") -> None:
        self._returned.append(self._loans.pop(id(reference))[1])

    def close(self) -> None:
        """Release what is not lent out."""
        while self._returned:
            self._pool.give(self._returned.popleft())
        self._pool.close()
