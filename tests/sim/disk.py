"""The fake disk of one machine: files, and the row stores on it.

Fault model. What a correct cluster must survive:
- death of the process between any two operations, or in the middle of a write, of which a prefix
  is then there: nothing else is lost, the page cache belongs to the kernel;
- power cut between any two operations: of every unsynced write any subset of its 512-byte sectors
  remains, in any order; sizes fall back to what was synced; a row store keeps a prefix of its
  unsynced batches;
- bit rot: any byte of a block file changes silently, cached or not;
- ENOSPC and EIO from any write, EIO from any read or sync; after a failed sync nobody knows what
  is stable, so the writes before it count as unsynced until the file is written again;
- a slow disk: any operation takes up to seconds.
Also: a disk that is swapped for an empty one.

What it need not survive: a row store or a small file (which replace_small writes atomically and
durably) that lies; rot in a row store (RocksDB has checksums of its own, and refuses to open);
a disk that acknowledges a sync and loses the data.
"""

import errno
import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from emberfs.kv.memory import MemoryStore
from emberfs.kv.store import Change, Range, Row, View
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import GiB
from sim.loop import PROCESS, Killed

SECTOR_BYTES = 512
CACHED_SHARE = 0.7  # of the reads find their data in memory
CAPACITY_BYTES = 64 * GiB


class Faults:
    """What goes wrong on one disk just now; the nemesis sets it."""

    def __init__(self) -> None:
        self.full = False
        self.write_error_share = 0.0
        self.read_error_share = 0.0
        self.sync_error_share = 0.0
        self.slow_factor = 1.0
        self.die_after = -1  # operations until the process dies; -1: never
        self.counts: dict[str, int] = {}

    def count(self, kind: str) -> None:
        """Note a fault that took effect."""
        self.counts[kind] = self.counts.get(kind, 0) + 1


class Fate(NamedTuple):
    """What a power cut leaves of what was not synced, where a script chooses it."""

    data: bool  # all writes to files, or none
    rows: bool  # all batches of the row stores, or none


class SimFile:
    """Content in memory and on the platter."""

    def __init__(self) -> None:
        self.data = bytearray()  # what reads see
        self.length = 0  # may be longer than data: the rest is zeros
        self.durable = bytearray()
        self.durable_length = 0
        self.unsynced: list[tuple[int, bytes]] = []


class SimDisk:
    """See runtime.env.Disk, and the module for its faults."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.faults = Faults()
        self.files: dict[str, SimFile] = {}
        self.small: dict[str, bytes] = {}
        self.stores: dict[str, MemoryStore] = {}
        self.locks: dict[str, object] = {}
        self.fate: Fate | None = None  # None: dice

    # ------------------------------------------------------------ faults

    def step(self) -> None:
        """One operation: dies here if it is time, or if the process is dead already."""
        process = PROCESS.get()
        if process is not None and not process.alive:
            raise Killed
        if self.faults.die_after >= 0:
            self.faults.die_after -= 1
            if self.faults.die_after < 0:
                self.faults.count("death between disk operations")
                if process is not None:
                    process.kill()
                raise Killed

    def power_cut(self) -> None:
        """Lose what was not synced. All processes of the machine must be dead."""
        for file in self.files.values():
            self._tear(file)
        for store in self.stores.values():
            count = store.unsynced_count
            if self.fate is None:
                store.crash(self.dice.randint(0, count))
            else:
                store.crash(count if self.fate.rows else 0)
        self.locks.clear()

    def _tear(self, file: SimFile) -> None:
        dice = self.dice
        for offset, content in file.unsynced:
            fate = dice.random() if self.fate is None else float(self.fate.data)
            if fate < 0.3:
                continue
            for at in range(0, len(content), SECTOR_BYTES):
                if fate >= 0.7 or dice.random() < 0.5:
                    overwrite(file.durable, content[at : at + SECTOR_BYTES], offset + at)
        file.unsynced = []
        file.length = max(file.durable_length, len(file.durable))
        file.data = bytearray(file.durable)

    def wipe(self) -> None:
        """Swap the disk for an empty one."""
        for table in (self.files, self.small, self.stores, self.locks):
            table.clear()  # type: ignore[attr-defined]

    def rot(self) -> bool:
        """Flip a byte of a block file; False if there is none."""
        names = sorted(name for name, file in self.files.items() if any(file.data))
        if not names:
            return False
        file = self.files[self.dice.choice(names)]
        used = [at for at in range(0, len(file.data), SECTOR_BYTES) if any(file.data[at : at + 64])]
        at = self.dice.choice(used or [0])
        flip = self.dice.randrange(1, 256)
        file.data[at] ^= flip
        if at < len(file.durable):
            file.durable[at] ^= flip
        return True

    def fails(self, share: float) -> bool:
        """Tell whether this operation fails."""
        return share > 0 and self.dice.random() < share

    # ------------------------------------------------------------ the Disk protocol

    def open(self, path: str, *, create: bool = False) -> "OpenSimFile":
        """Open for reading and writing."""
        self.step()
        if path not in self.files:
            if not create:
                raise FileNotFoundError(errno.ENOENT, "No such file", path)
            self.files[path] = SimFile()
        return OpenSimFile(self, self.files[path])

    def make_directory(self, path: str) -> None:
        """Directories are always there."""
        self.step()

    def names(self, path: str) -> list[str]:
        """Sorted names in a directory."""
        prefix = path.rstrip("/") + "/"
        found = {
            name[len(prefix) :].split("/")[0]
            for table in (self.files, self.small, self.stores)
            for name in table  # type: ignore[attr-defined]
            if name.startswith(prefix)
        }
        return sorted(found)

    def exists(self, path: str) -> bool:
        """Tell whether a path exists."""
        return path in self.files or path in self.small or bool(self.names(path))

    def read_small(self, path: str) -> bytes:
        """Whole content of a small file."""
        self.step()
        if path not in self.small:
            raise FileNotFoundError(errno.ENOENT, "No such file", path)
        return self.small[path]

    def replace_small(self, path: str, content: bytes) -> None:
        """Atomic and durable."""
        self.step()
        self.small[path] = bytes(content)

    def remove(self, path: str) -> None:
        """Remove a file; a missing one is fine."""
        self.step()
        self.files.pop(path, None)
        self.small.pop(path, None)

    def space(self, path: str) -> "SimSpace":
        """Room on the disk."""
        used = sum(len(file.data) for file in self.files.values())
        free = 0 if self.faults.full else max(0, CAPACITY_BYTES - used)
        return SimSpace(CAPACITY_BYTES, free)

    def lock(self, path: str) -> Callable[[], None]:
        """As flock: gone with its process."""
        self.step()
        process = PROCESS.get()
        holder = self.locks.get(path)
        if holder is not None and getattr(holder, "alive", True):
            raise BlockingIOError(errno.EAGAIN, "locked")
        self.locks[path] = process or object()
        return lambda: self.locks.pop(path, None) and None

    def open_store(self, path: str) -> "SimStore":
        """Open a row store (kv.store.OrderedStore)."""
        self.step()
        return SimStore(self, self.stores.setdefault(path, MemoryStore()))


class SimSpace(NamedTuple):
    """Room on a disk."""

    total_bytes: int
    free_bytes: int


class OpenSimFile:
    """See runtime.env.DiskFile."""

    def __init__(self, disk: SimDisk, file: SimFile) -> None:
        self._disk = disk
        self._file = file

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view`; short only at the end of the file."""
        self._disk.step()
        if self._disk.fails(self._disk.faults.read_error_share):
            self._disk.faults.count("EIO on read")
            raise OSError(errno.EIO, "Input/output error")
        return self._fill(view, offset)

    def _fill(self, view: memoryview, offset: int) -> int:
        file = self._file
        found = file.data[offset : offset + len(view)]
        view[: len(found)] = found
        end = max(0, min(len(view), file.length - offset))
        if end > len(found):
            view[len(found) : end] = bytes(end - len(found))
        return max(end, len(found))

    def fileno(self) -> int:
        """None: reads go one by one."""
        return -1

    def read_cached_into(self, view: memoryview, offset: int) -> int:
        """As read_into, or -1."""
        self._disk.step()
        if self._disk.dice.random() > CACHED_SHARE:
            return -1
        return self._fill(view, offset)

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write all of `views`; dying in the middle leaves a prefix."""
        content = b"".join(views)
        disk = self._disk
        try:
            disk.step()
        except Killed:
            self._put(content[: disk.dice.randrange(len(content) + 1)], offset)
            raise
        if disk.faults.full and offset + len(content) > self._file.length:
            disk.faults.count("ENOSPC on write")
            raise OSError(errno.ENOSPC, "No space left on device")
        if disk.fails(disk.faults.write_error_share):
            disk.faults.count("EIO on write")
            self._put(content[: disk.dice.randrange(len(content) + 1)], offset)
            raise OSError(errno.EIO, "Input/output error")
        self._put(content, offset)

    def _put(self, content: bytes, offset: int) -> None:
        overwrite(self._file.data, content, offset)
        self._file.length = max(self._file.length, len(self._file.data))
        self._file.unsynced.append((offset, content))

    def allocate(self, offset: int, length: int) -> None:
        """Reserve space."""
        self._disk.step()
        if self._disk.faults.full and offset + length > self._file.length:
            self._disk.faults.count("ENOSPC on allocate")
            raise OSError(errno.ENOSPC, "No space left on device")
        self._file.length = max(self._file.length, offset + length)

    def punch(self, offset: int, length: int) -> None:
        """Give space back; it reads as zeros."""
        self._disk.step()
        file = self._file
        end = min(len(file.data), offset + length)
        if end > offset:
            self._put(bytes(end - offset), offset)
        if offset + length >= file.length:
            file.length = offset
            del file.data[offset:]

    def size(self) -> int:
        """Length in bytes."""
        return self._file.length

    def datasync(self) -> None:
        """Make the content stable."""
        disk, file = self._disk, self._file
        disk.step()
        if disk.fails(disk.faults.sync_error_share):
            disk.faults.count("EIO on sync")
            raise OSError(errno.EIO, "Input/output error")
        for offset, content in file.unsynced:
            overwrite(file.durable, content, offset)
        file.durable_length = file.length
        file.unsynced = []

    def close(self) -> None:
        """Nothing to release."""


class SimStore:
    """A process's handle on a row store of a disk (kv.store.OrderedStore)."""

    def __init__(self, disk: SimDisk, rows: MemoryStore) -> None:
        self._disk = disk
        self._rows = rows

    def get(self, key: bytes) -> bytes | None:
        """See OrderedStore."""
        return self._rows.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See OrderedStore."""
        return self._rows.get_many(keys)

    def scan(
        self, start: bytes, stop: bytes, *, limit: int = 0, reverse: bool = False
    ) -> list[Row]:
        """See OrderedStore."""
        return self._rows.scan(start, stop, limit=limit, reverse=reverse)

    def snapshot(self) -> View:
        """See OrderedStore."""
        return self._rows.snapshot()

    def write(self, changes: Iterable[Change], clears: Sequence[Range] = ()) -> None:
        """See OrderedStore; a process that dies here leaves all of it or nothing."""
        disk, changes = self._disk, list(changes)
        living = disk.faults.die_after >= 0
        try:
            disk.step()
        except Killed:
            if living and disk.dice.random() < 0.5:
                self._rows.write(changes, clears)
            raise
        if disk.faults.full and any(value is not None for _, value in changes):
            disk.faults.count("ENOSPC of a row store")
            raise EmberfsError(Code.NO_SPACE, "No space left on device")
        if disk.fails(disk.faults.write_error_share):
            disk.faults.count("EIO of a row store")
            raise EmberfsError(Code.DISK, "Input/output error")
        self._rows.write(changes, clears)

    def sync(self) -> None:
        """See OrderedStore."""
        self._disk.step()
        if self._disk.fails(self._disk.faults.sync_error_share):
            self._disk.faults.count("EIO on sync of a row store")
            raise EmberfsError(Code.DISK, "Input/output error")
        self._rows.sync()

    def close(self) -> None:
        """Nothing to release."""


def overwrite(target: bytearray, content: bytes, offset: int) -> None:
    """Put content at an offset, with zeros before it if need be."""
    if len(target) < offset:
        target.extend(bytes(offset - len(target)))
    target[offset : offset + len(content)] = content
