"""The seam between emberfs and the outside world.

All code takes clock, randomness, disk and threads from an Env. Production gives it
runtime/real.py; the simulator gives it virtual time and fake devices.
"""

import random
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class DiskFile(Protocol):
    """An open file on a disk. All offsets and sizes in bytes. Raises OSError as the OS does."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset`; short only at the end of the file. Blocks."""
        ...

    def read_cached_into(self, view: memoryview, offset: int) -> int:
        """As read_into, but returns -1 instead of blocking when the data is not in memory."""
        ...

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write all of `views` one after another from `offset`."""
        ...

    def allocate(self, offset: int, length: int) -> None:
        """Reserve space (fallocate), so that later writes to it cannot meet ENOSPC."""
        ...

    def punch(self, offset: int, length: int) -> None:
        """Give space back to the file system; it reads as zeros afterwards."""
        ...

    def size(self) -> int:
        """Current length of the file."""
        ...

    def fileno(self) -> int:
        """A descriptor for reads in one compiled call (checkedread.py); -1 if there is none."""
        ...

    def datasync(self) -> None:
        """fdatasync. After an error the caller must not trust the file any more. Blocks."""
        ...

    def close(self) -> None:
        """Close it. Does not sync."""
        ...


class Space(Protocol):
    """Room on a file system, in bytes."""

    @property
    def total_bytes(self) -> int:
        """Size of the file system."""
        ...

    @property
    def free_bytes(self) -> int:
        """What an unprivileged user may still write."""
        ...


class Disk(Protocol):
    """A directory tree on stable storage."""

    def open(self, path: str, *, create: bool = False) -> DiskFile:
        """Open for reading and writing."""
        ...

    def make_directory(self, path: str) -> None:
        """Create a directory and its parents; an existing one is fine."""
        ...

    def names(self, path: str) -> list[str]:
        """Sorted names in a directory; empty if it does not exist."""
        ...

    def exists(self, path: str) -> bool:
        """Tell whether a path exists."""
        ...

    def read_small(self, path: str) -> bytes:
        """Whole content of a small file. FileNotFoundError if there is none."""
        ...

    def replace_small(self, path: str, content: bytes) -> None:
        """Atomically and durably replace a small file (write, sync, rename, sync directory)."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file; a missing one is fine."""
        ...

    def space(self, path: str) -> Space:
        """Room on the file system that holds `path`."""
        ...

    def lock(self, path: str) -> Callable[[], None]:
        """Take an exclusive lock file; returns its release. BlockingIOError if another holds it."""
        ...


class Env(Protocol):
    """Everything a process may know or do besides computing."""

    random: random.Random
    boot_id: str  # changes when the machine restarts: unsynced data may be gone then
    host_key: str  # equal for processes that can share memory

    @property
    def disk(self) -> Disk:
        """The disks of this machine."""
        ...

    def now_ns(self) -> int:
        """Monotonic clock: durations, leases, deadlines."""
        ...

    def wall_ns(self) -> int:
        """Time of day since 1970: only for timestamps that people see."""
        ...

    async def sleep_ns(self, duration_ns: int) -> None:
        """Pause this task."""
        ...

    async def run_blocking(self, work: Callable[[], T]) -> T:
        """Run a blocking function outside the event loop."""
        ...

    def bequeath(self, module: str, words: str) -> None:
        """Have `python -m module words` run should this process die; no words take it back.

        It runs when no thread of the process can execute another line. It need not run: the
        machine may die, too.
        """
        ...
