"""A stand-in for FoundationDB's Python binding, as far as kv/foundationdb.py uses it.

It proves nothing about FoundationDB: names and meanings are taken from the binding's source and
documentation. With it the conformance suite at least runs every line of the adapter.
"""

import threading
from collections.abc import Callable
from typing import Any

from sortedcontainers import SortedDict


class FDBError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code
        self.description = f"error {code}".encode()


class Future:
    """Becomes ready in another thread, as the real one does in its network thread."""

    def __init__(self, result: Callable[[], Any]) -> None:
        self._result = result
        self.value: Any = None

    def on_ready(self, callback: Callable[["Future"], None]) -> None:
        threading.Thread(target=callback, args=(self,)).start()

    def wait(self) -> Any:
        found = self._result()
        if isinstance(found, FDBError):
            raise found
        self.value = found
        return found

    def present(self) -> bool:
        return self.value is not None


class KeySelector:
    def __init__(self, key: bytes) -> None:
        self.key = key

    @classmethod
    def first_greater_or_equal(cls, key: bytes) -> "KeySelector":
        return cls(key)


class StreamingMode:
    want_all = -1


class KeyValue:
    def __init__(self, key: bytes, value: bytes) -> None:
        self.key, self.value = key, value


class Database:
    def __init__(self) -> None:
        self.version = 1
        self.rows: SortedDict = SortedDict()
        self.history: dict[int, tuple[list[bytes], list[tuple[bytes, bytes]]]] = {}
        self.old: dict[int, dict[bytes, bytes]] = {1: {}}

    def create_transaction(self) -> "Transaction":
        return Transaction(self)


DATABASES: dict[str, Database] = {}


def open(cluster_file: str) -> Database:  # noqa: A001
    return DATABASES.setdefault(cluster_file, Database())


def api_version(version: int) -> None:
    pass


class Options:
    def set_timeout(self, milliseconds: int) -> None:
        pass


class Transaction:
    def __init__(self, database: Database) -> None:
        self._db = database
        self._read_at = 0
        self._seen: SortedDict | None = None
        self._committed = -1
        self._cancelled = False
        self._keys: list[bytes] = []
        self._ranges: list[tuple[bytes, bytes]] = []
        self._writes: dict[bytes, bytes | None] = {}
        self._stamps: dict[bytes, bytes] = {}
        self._clears: list[tuple[bytes, bytes]] = []
        self.options = Options()
        self.snapshot = self

    def _view(self) -> SortedDict:
        if self._seen is None:
            self._read_at = self._db.version
            self._seen = SortedDict(self._db.old[self._read_at])
        return self._seen

    def get(self, key: bytes) -> Future:
        return Future(lambda: self._view().get(key))

    def get_read_version(self) -> Future:
        def version() -> int:
            self._view()
            return self._read_at

        return Future(version)

    def _get_range(
        self, begin: KeySelector, end: KeySelector, limit: int, mode: int, turn: int, reverse: bool
    ) -> Future:
        def rows() -> tuple[list[KeyValue], int, int]:
            view = self._view()
            keys = list(view.irange(begin.key, end.key, (True, False), reverse=reverse))
            most = min(limit or 7, 7)  # the real one answers in pages, too
            found = [KeyValue(key, view[key]) for key in keys[:most]]
            return found, len(found), int(len(keys) > most)

        return Future(rows)

    def add_read_conflict_key(self, key: bytes) -> None:
        self._keys.append(key)

    def add_read_conflict_range(self, start: bytes, stop: bytes) -> None:
        self._ranges.append((start, stop))

    def set(self, key: bytes, value: bytes) -> None:
        self._writes[key] = value

    def clear(self, key: bytes) -> None:
        self._writes[key] = None

    def clear_range(self, start: bytes, stop: bytes) -> None:
        self._clears.append((start, stop))

    def set_versionstamped_value(self, key: bytes, parameter: bytes) -> None:
        self._stamps[key] = parameter

    def commit(self) -> Future:
        return Future(self._commit)

    def _commit(self) -> FDBError | None:
        self._view()
        spans = [*self._ranges, *((key, key + b"\0") for key in self._keys)]
        for version in range(self._read_at + 1, self._db.version + 1):
            keys, clears = self._db.history[version]
            if any(start <= key < stop for start, stop in spans for key in keys):
                return FDBError(1020)
            if any(low < stop and start < high for start, stop in spans for low, high in clears):
                return FDBError(1020)
        self._db.version += 1
        rows = self._db.rows
        for start, stop in self._clears:
            for key in list(rows.irange(start, stop, (True, False))):
                del rows[key]
        for key, value in self._writes.items():
            if value is None:
                rows.pop(key, None)
            else:
                rows[key] = value
        for key, parameter in self._stamps.items():
            value, place = parameter[:-4], int.from_bytes(parameter[-4:], "little")
            stamp = self._db.version.to_bytes(8, "big") + b"\0\0"
            rows[key] = value[:place] + stamp + value[place + 10 :]
        self._db.history[self._db.version] = ([*self._writes, *self._stamps], self._clears)
        self._db.old[self._db.version] = dict(rows)
        self._committed = self._db.version
        return None

    def get_committed_version(self) -> int:
        return self._committed

    def cancel(self) -> None:
        self._cancelled = True
