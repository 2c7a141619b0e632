"""The block files of a target: one file per size class, groups one after another.

One file per class keeps a flush at no more than eleven fdatasync calls however many blocks changed.
"""

import errno
import threading
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import KiB, MiB
from emberfs.runtime.env import Disk, DiskFile, Space
from emberfs.storage.allocator import (
    CLASS_BYTES,
    GROUP_BYTES,
    block_bytes,
    place_of,
)

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_error(problem: OSError, what: str) -> EmberfsError:
    """Translate an OSError: NO_SPACE or DISK."""
    if problem.errno in _NO_ROOM:
        return EmberfsError(
            Code.NO_SPACE, f"{what}: {problem.strerror}; delete data or add targets"
        )
    return EmberfsError(Code.DISK, f"{what}: {problem}; check the disk")


def file_name(size_class: int) -> str:
    """Name of the file of a class, e.g. "blocks.64K"."""
    return f"blocks.{CLASS_BYTES[size_class] // KiB}K"


def record_reserve_bytes(space: Space) -> int:
    """Space that blocks never take: removing a chunk on a full disk needs room for its record."""
    return min(256 * MiB, max(24 * MiB, space.total_bytes // 20))


@runtime_checkable
class CacheDropping(Protocol):
    """A DiskFile that can forget what it keeps in memory."""

    def drop_cached(self, offset: int, length: int) -> None:
        """Drop the clean pages of a range; advice, never an error."""
        ...


class BlockFiles:
    """Reads and writes blocks. Thread-safe."""

    def __init__(self, disk: Disk, path: str) -> None:
        """Open (or create) the files of all classes. The caller syncs the directory."""
        self._disk = disk
        self._path = path
        self._files: list[DiskFile] = []
        for size_class in range(len(CLASS_BYTES)):
            self._files.append(disk.open(f"{path}/{file_name(size_class)}", create=True))
        self._dirty: set[int] = set()
        self._dirty_lock = threading.Lock()

    def reserve_group(self, size_class: int, group: int) -> None:
        """Reserve a group's space. Raises NO_SPACE or DISK."""
        size = GROUP_BYTES[size_class]
        space = self._disk.space(self._path)
        if space.free_bytes - size < record_reserve_bytes(space):
            raise EmberfsError(Code.NO_SPACE, f"{self._path}: full; delete data or add targets")
        try:
            self._files[size_class].allocate(group * size, size)
        except OSError as problem:
            self.release_group(size_class, group)  # it may have got a part
            raise disk_error(problem, f"reserving {size >> 10} KiB for blocks") from None
        self._mark_dirty(size_class)

    def release_group(self, size_class: int, group: int) -> None:
        """Give an empty group's space back; failing to is only a waste of space."""
        try:
            self._files[size_class].punch(group * GROUP_BYTES[size_class], GROUP_BYTES[size_class])
        except OSError:
            pass

    def group_limit(self, size_class: int) -> int:
        """Number of groups that the file has room for, a started one included."""
        return -(-self._files[size_class].size() // GROUP_BYTES[size_class])

    def read_into(self, position: int, offset: int, view: memoryview) -> int:
        """Fill `view` with a block's bytes from `offset`; short only past the end of the file.

        Raises DISK.
        """
        size_class, start = place_of(position)
        try:
            return self._files[size_class].read_into(view, start + offset)
        except OSError as problem:
            raise disk_error(problem, "reading a block") from None

    def read_cached_into(self, position: int, offset: int, view: memoryview) -> int:
        """As read_into, but -1 when the data is not in memory."""
        size_class, start = place_of(position)
        try:
            return self._files[size_class].read_cached_into(view, start + offset)
        except OSError as problem:
            raise disk_error(problem, "reading a block") from None

    def descriptor(self, position: int) -> tuple[int, int]:
        """Where a block is: a file descriptor, -1 if there is none, and the offset of the block."""
        size_class, start = place_of(position)
        return self._files[size_class].fileno(), start

    def is_cached(self, position: int) -> bool:
        """Tell whether a block's beginning is in memory."""
        probe = memoryview(bytearray(1))
        return self.read_cached_into(position, 0, probe) == 1

    def drop_cached(self, position: int, length: int) -> None:
        """Let the next read of a block come from the disk, where the system knows how."""
        size_class, start = place_of(position)
        file = self._files[size_class]
        if isinstance(file, CacheDropping):
            file.drop_cached(start, length)

    def write(self, position: int, offset: int, views: Sequence[memoryview]) -> None:
        """Write `views` into a block from `offset`. Raises NO_SPACE or DISK."""
        assert offset + sum(map(len, views)) <= block_bytes(position)
        size_class, start = place_of(position)
        try:
            self._files[size_class].write(views, start + offset)
        except OSError as problem:
            raise disk_error(problem, "writing a block") from None
        finally:
            # Only after the write: a flush that took the mark before it would not cover it.
            self._mark_dirty(size_class)

    def _mark_dirty(self, size_class: int) -> None:
        with self._dirty_lock:
            self._dirty.add(size_class)

    def mark_all_dirty(self) -> None:
        """What an earlier process wrote may be unsynced."""
        with self._dirty_lock:
            self._dirty.update(range(len(CLASS_BYTES)))

    def take_dirty(self) -> list[int]:
        """Return the classes written since the last call."""
        with self._dirty_lock:
            taken, self._dirty = self._dirty, set()
        return sorted(taken)

    def sync(self, size_classes: Sequence[int]) -> None:
        """Make everything written to these classes stable. Raises DISK."""
        for size_class in size_classes:
            try:
                self._files[size_class].datasync()
            except OSError as problem:
                raise EmberfsError(
                    Code.DISK, f"syncing {file_name(size_class)}: {problem}; check the disk"
                ) from None

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()
