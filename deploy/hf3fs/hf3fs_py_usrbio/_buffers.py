"""Memory that I/O goes to and comes from.

Only addresses are kept, never an export of the caller's buffer: callers close their shared memory
while slices of it are still around, and Python would refuse (BufferError).
"""

import ctypes
import os
import uuid
from typing import TYPE_CHECKING, Self

from hf3fs_py_usrbio._library import Iov, check, lib
from hf3fs_py_usrbio._window import Window

if TYPE_CHECKING:
    from typing_extensions import Buffer


def _place(buffer: "Buffer") -> tuple[int, int]:
    """Address and bytes of a writable contiguous buffer, which is not held any longer."""
    view = memoryview(buffer)
    try:
        if view.readonly or not view.c_contiguous:
            raise ValueError("the buffer must be writable and contiguous")
        if view.nbytes == 0:
            return 0, 0
        export = (ctypes.c_char * view.nbytes).from_buffer(view)
        place = ctypes.addressof(export), view.nbytes
        del export
        return place
    finally:
        view.release()


class iovec(Window):  # noqa: N801
    """A buffer, or a slice of one. What wait() hands back has `result` and `userdata` set."""

    def __init__(
        self,
        base: "Buffer",
        id: str,  # noqa: A002
        hf3fs_mount_point: str,
        block_size: int = 0,
        numa: int = -1,
    ) -> None:
        """Describe `base` under an id. Raises ValueError for a bad uuid, OSError EINVAL."""
        raw = uuid.UUID(id).bytes
        address, size = _place(base)
        iov = Iov()
        mount_point = os.fsencode(hf3fs_mount_point)
        check(
            lib.hf3fs_iovwrap(ctypes.byref(iov), address, raw, mount_point, size, block_size, numa)
        )
        self._become(iov, address, size)

    def _become(self, root: Iov, address: int, length: int) -> None:
        Window.__init__(self, address, length)
        self._root = root
        self._address = address
        self._length = length
        self._result = 0
        self._userdata: object = None

    def _part(self, start: int, stop: int) -> Self:
        part = type(self).__new__(type(self))
        part._become(self._root, self._address + start, max(0, stop - start))
        return part

    def __getitem__(self, key: slice) -> Self:
        """The part of a slice. Raises ValueError for a step, TypeError for an index."""
        if not isinstance(key, slice):
            raise TypeError("a buffer is taken in slices: iov[start:stop]")
        start, stop, step = key.indices(self._length)
        if step != 1:
            raise ValueError("a slice of a buffer has step 1")
        return self._part(start, stop)

    def slice_by(self, buf: "Buffer") -> Self:
        """The part that `buf`, a view of the same memory, covers. Raises IndexError outside."""
        address, size = _place(buf)
        start = address - self._address
        if start < 0 or start + size > self._length:
            raise IndexError("the buffer is not inside of this one")
        return self._part(start, start + size)

    @property
    def result(self) -> int:
        """Bytes moved by the last I/O, or -errno; 0 before."""
        return self._result

    @property
    def userdata(self) -> object:
        """What was given to prepare(); None before completion."""
        return self._userdata

    @property
    def base_off(self) -> int:
        """Offset in bytes in the buffer that this was cut out of."""
        return self._address - (self._root.base or 0)
