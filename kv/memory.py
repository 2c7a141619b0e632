"""OrderedStore in memory, for tests and the simulator: same contract, and it can crash."""

from collections.abc import Iterable, Sequence

from sortedcontainers import SortedDict

from emberfs.kv.store import Change, Range, Row
from emberfs.kv.view import StableView, Views
from emberfs.proto.errors import EmberfsError


class MemoryStore:
    """Rows in a sorted dictionary.

    `write_error` and `sync_error`, when set, are raised instead of working (fault injection).
    """

    def __init__(self) -> None:
        self._rows: SortedDict = SortedDict()
        self._views = Views()
        # What each write since the last sync replaced, oldest write first.
        self._unsynced: list[list[Change]] = []
        self.write_error: EmberfsError | None = None
        self.sync_error: EmberfsError | None = None

    def get(self, key: bytes) -> bytes | None:
        """Return the value, None if absent."""
        value: bytes | None = self._rows.get(key)
        return value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values in the order of the keys."""
        return [self._rows.get(key) for key in keys]

    def scan(
        self, start: bytes, stop: bytes, *, limit: int = 0, reverse: bool = False
    ) -> list[Row]:
        """Return the rows of [start, stop)."""
        rows: list[Row] = []
        if start >= stop:
            return rows
        with self._views.lock:  # a writer in another thread would move the rows under us
            for key in self._rows.irange(start, stop, inclusive=(True, False), reverse=reverse):
                rows.append((key, self._rows[key]))
                if len(rows) == limit:
                    break
        return rows

    def snapshot(self) -> StableView:
        """A view of this moment."""
        return self._views.open(self)

    def write(self, changes: Iterable[Change], clears: Sequence[Range] = ()) -> None:
        """Apply atomically: the clears first, then the changes."""
        if self.write_error is not None:
            raise self.write_error
        changes = list(changes)
        replaced: dict[bytes, bytes | None] = {}
        with self._views.lock:
            self._views.save(self, changes, clears)
            for start, stop in clears:
                for key, value in self.scan(start, stop):
                    replaced.setdefault(key, value)
                    self._put(key, None)
            for key, new in changes:
                replaced.setdefault(key, self._rows.get(key))
                self._put(key, new)
        self._unsynced.append(list(replaced.items()))

    def _put(self, key: bytes, value: bytes | None) -> None:
        if value is None:
            self._rows.pop(key, None)
        else:
            self._rows[key] = value

    def sync(self) -> None:
        """Make all earlier writes stable."""
        if self.sync_error is not None:
            raise self.sync_error
        self._unsynced = []

    @property
    def unsynced_count(self) -> int:
        """How many writes a crash could take away."""
        return len(self._unsynced)

    def crash(self, keep: int = 0) -> None:
        """Power cut: only the first `keep` of the unsynced writes survive (a suffix is lost)."""
        assert keep >= 0
        while len(self._unsynced) > keep:
            for key, value in self._unsynced.pop():
                self._put(key, value)
        self._unsynced = []

    def close(self) -> None:
        """Nothing to release: the rows stay, as on a disk."""
