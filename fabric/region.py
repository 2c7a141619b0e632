"""Memory that a fabric call names: a Region is a memfd mapping that another process can map too.

A plain memoryview works everywhere as well; on the shm transport it is streamed through the socket
instead of being mapped, so whoever wants the zero-copy path allocates a Region.
"""

import fcntl
import mmap
import os
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import GiB

# All regions that one connection has shared at a time; each is mapped in the server.
SHARED_BYTES_MAX = 256 * GiB


def sealed_bytes(fd: int) -> int:
    """Size of a memfd that can never shrink: an access beyond its end raises SIGBUS and kills.

    ValueError if it could, OSError if it is something else, which is told without asking it.
    """
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ValueError("it is not sealed against shrinking (F_SEAL_SHRINK)")
    return os.fstat(fd).st_size


class Region:
    """Anonymous shared memory of a fixed size, freed by the kernel when its last user is gone."""

    _count = 0

    def __init__(self, size_bytes: int, fd: int = -1) -> None:
        """Allocate `size_bytes` (rounded up to pages). Raises OSError when memory is short.

        With a descriptor, the memory is that of another process: see `adopt`.
        """
        assert size_bytes > 0
        Region._count += 1
        self.id = Region._count  # unique in this process, never reused
        self.size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        # After a call that the server did not confirm to have ended, it may still write here: the
        # memory must not be used for anything else, only closed.
        self.abandoned = False
        # Called with the id when the region is closed; connections that registered it listen.
        self.watchers: set[Callable[[int], None]] = set()
        self.fd = fd if fd >= 0 else self._allocated()
        self._map = mmap.mmap(self.fd, self.size_bytes)
        self.view = memoryview(self._map)

    def _allocated(self) -> int:
        fd = os.memfd_create(f"emberfs-{self.id}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, self.size_bytes)
        # A server maps it only when it cannot shrink: it would die of SIGBUS (memfd_create(2)).
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return fd

    @classmethod
    def adopt(cls, fd: int) -> "Region":
        """Map memory that came from another process, and own its descriptor.

        INVALID, the descriptor still being the caller's, if it could shrink or is no memfd.
        """
        try:
            size_bytes = sealed_bytes(fd)
            if not size_bytes or size_bytes % mmap.PAGESIZE:
                raise ValueError(f"its size, {size_bytes}, is not a number of pages")
            return cls(size_bytes, fd)
        except (ValueError, OSError) as problem:
            raise EmberfsError(Code.INVALID, f"the memory is of no use: {problem}") from None

    def slice(self, offset: int, length: int) -> "Slice":
        """Name a part of this region."""
        assert offset >= 0
        assert length >= 0
        assert offset + length <= self.size_bytes
        return Slice(self, offset, length)

    def close(self) -> None:
        """Give the descriptor back. The mapping lives on while someone holds a view of it."""
        if self.fd >= 0:
            for watcher in list(self.watchers):
                watcher(self.id)
            self.watchers.clear()
            os.close(self.fd)
            self.fd = -1
            try:
                self.view.release()
                self._map.close()
            except BufferError:  # a slice is still held: the last holder frees the mapping
                pass


class Slice(NamedTuple):
    """A part of a region."""

    region: Region
    offset: int
    length: int

    @property
    def view(self) -> memoryview:
        """The memory itself, writable."""
        return self.region.view[self.offset : self.offset + self.length]


Buffer: TypeAlias = Slice | memoryview


def view_of(buffer: Buffer) -> memoryview:
    """Return the memory of either kind of buffer."""
    return buffer.view if isinstance(buffer, Slice) else buffer


def length_of(buffer: Buffer) -> int:
    """Return the size in bytes of either kind of buffer."""
    return buffer.length if isinstance(buffer, Slice) else buffer.nbytes
