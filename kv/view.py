"""Stable views of a store: current rows, except those replaced since the view was taken.

rocksdict 0.3.29 cannot give us this: iterators of its snapshots show the newest rows (tested). A
store has one writer path here, so each write saves the values that it replaces into the views that
are alive; as views live for one short transaction, there is mostly none.

Safe with threads: a value is saved before it is replaced, and a reader consults what was saved
after it has read the rows.
"""

from collections.abc import Iterable, Sequence
from threading import RLock
from weakref import WeakSet

from emberfs.kv.store import Change, Range, Row, View


class StableView:
    """The store as it was."""

    def __init__(self, store: View) -> None:
        self._store = store
        self._kept: dict[bytes, bytes | None] = {}

    def keep(self, key: bytes, value: bytes | None) -> None:
        """Remember a value that is about to be replaced; the first one is ours."""
        self._kept.setdefault(key, value)

    def get(self, key: bytes) -> bytes | None:
        """Return the value, None if absent."""
        value = self._store.get(key)
        if self._kept and key in self._kept:
            value = self._kept[key]
        return value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values in the order of the keys."""
        values = self._store.get_many(keys)
        if self._kept:
            kept = self._kept
            return [kept.get(key, value) for key, value in zip(keys, values, strict=True)]
        return values

    def scan(
        self, start: bytes, stop: bytes, *, limit: int = 0, reverse: bool = False
    ) -> list[Row]:
        """Return the rows of [start, stop)."""
        if start >= stop:
            return []
        before = len(self._kept)
        # Every saved value hides at most one row of the store.
        page = limit + before if limit else 0
        found = self._store.scan(start, stop, limit=page, reverse=reverse)
        if not self._kept:
            return found
        if len(self._kept) != before:  # a thread wrote meanwhile: the page may be too short
            return self.scan(start, stop, limit=limit, reverse=reverse)
        rows = dict(found)
        for key, value in list(self._kept.items()):
            if not start <= key < stop:
                continue
            if value is None:
                rows.pop(key, None)
            else:
                rows[key] = value
        ordered = sorted(rows.items(), reverse=reverse)
        return ordered[:limit] if limit else ordered


class Views:
    """The stable views of one store that are still in use, and the lock of its writers."""

    def __init__(self) -> None:
        self._alive: WeakSet[StableView] = WeakSet()
        self.lock = RLock()  # held by a writer from `save` until its rows are replaced

    def open(self, store: View) -> StableView:
        """Take a view of this moment."""
        view = StableView(store)
        with self.lock:
            self._alive.add(view)
        return view

    def save(self, store: View, changes: Iterable[Change], clears: Sequence[Range]) -> None:
        """Save into every view what a write is about to replace. The caller holds the lock."""
        views = list(self._alive)
        if not views:
            return
        keys = {key for key, _ in changes}
        for start, stop in clears:
            keys.update(key for key, _ in store.scan(start, stop))
        ordered = sorted(keys)
        for key, value in zip(ordered, store.get_many(ordered), strict=True):
            for view in views:
                view.keep(key, value)
