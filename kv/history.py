"""What transactions read and wrote, and who wrote what since when: the basis of validation."""

from collections import deque
from typing import NamedTuple

from emberfs.kv.store import Range


class ReadSet(NamedTuple):
    """What a transaction depends on."""

    version: int  # of its snapshot
    keys: set[bytes]
    ranges: list[Range]


class WriteSet(NamedTuple):
    """What a transaction changes."""

    writes: dict[bytes, bytes | None]
    adds: dict[bytes, int]
    clears: list[Range]
    ranges: list[Range]  # conflict ranges without data
    stamps: dict[bytes, bytes]  # what comes before the stamp


class Commit(NamedTuple):
    """The footprint of one commit in the history."""

    version: int
    keys: tuple[bytes, ...]
    ranges: tuple[Range, ...]


class History:
    """Who wrote what since when: a deque of commits, and the last writer of each key."""

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        self._commits: deque[Commit] = deque()
        self._last_write: dict[bytes, int] = {}
        self._keys = 0
        self._ranges = 0
        self.forgotten = 0  # commits up to this version are no longer known

    def append(self, commit: Commit) -> None:
        """Remember a commit; forget the oldest ones beyond the bound."""
        self._commits.append(commit)
        self._keys += len(commit.keys) + 1
        self._ranges += len(commit.ranges)
        for key in commit.keys:
            self._last_write[key] = commit.version
        while self._keys > self._keys_max and len(self._commits) > 1:
            self._forget(self._commits.popleft())

    def _forget(self, commit: Commit) -> None:
        self._keys -= len(commit.keys) + 1
        self._ranges -= len(commit.ranges)
        self.forgotten = commit.version
        for key in commit.keys:
            if self._last_write.get(key) == commit.version:
                del self._last_write[key]

    def clear(self, version: int) -> None:
        """Forget everything up to `version`."""
        if self._commits:
            self._commits.clear()
            self._last_write.clear()
            self._keys = self._ranges = 0
        self.forgotten = version

    def conflicts(self, read: ReadSet) -> bool:
        """Tell whether anything of the read set was written after its snapshot."""
        last_write = self._last_write
        if any(last_write.get(key, 0) > read.version for key in read.keys):
            return True
        if not (read.ranges or self._ranges):
            return False
        for commit in reversed(self._commits):
            if commit.version <= read.version:
                return False
            if _touches(commit, read):
                return True
        return False


def _touches(commit: Commit, read: ReadSet) -> bool:
    for start, stop in read.ranges:
        if any(start <= key < stop for key in commit.keys):
            return True
        if any(low < stop and start < high for low, high in commit.ranges):
            return True
    return any(low <= key < high for low, high in commit.ranges for key in read.keys)
