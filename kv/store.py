"""An ordered byte store: what both the transaction engine and the chunk store stand on.

`write` is atomic and survives the death of the process at once; only what was written before a
successful `sync` is certain to survive a power cut, and after one the store holds a prefix of the
writes. Implementations: rocks.RocksStore (disk) and memory.MemoryStore (tests, simulator).
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

Row: TypeAlias = tuple[bytes, bytes]
Change: TypeAlias = tuple[bytes, bytes | None]  # None deletes
Range: TypeAlias = tuple[bytes, bytes]  # [start, stop)


class View(Protocol):
    """Something to read from."""

    def get(self, key: bytes) -> bytes | None:
        """Return the value, None if absent."""
        ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values in the order of the keys."""
        ...

    def scan(
        self, start: bytes, stop: bytes, *, limit: int = 0, reverse: bool = False
    ) -> list[Row]:
        """Return the rows of [start, stop) in key order; at most `limit` if that is not 0."""
        ...


class OrderedStore(View, Protocol):
    """A store in one process."""

    def snapshot(self) -> View:
        """A view that does not change any more."""
        ...

    def write(self, changes: Iterable[Change], clears: Sequence[Range] = ()) -> None:
        """Apply atomically: the clears first, then the changes. EmberfsError(NO_SPACE / DISK)."""
        ...

    def sync(self) -> None:
        """Make all earlier writes stable. Blocks, without the GIL: call it in a thread."""
        ...

    def close(self) -> None:
        """Release the store."""
        ...
