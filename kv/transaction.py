"""Serializable transactions over any OrderedStore, in one process and on one event loop.

Optimistic: a transaction reads from a snapshot, records what it read, and buffers its writes. The
commit is one critical section without awaits: validate that nothing read was written since the
snapshot (backward validation), then apply everything in one atomic write of the store.

Invariants:
- a transaction that commits saw the state exactly as it is at its commit;
- history holds the write set of every commit newer than `_forgotten`; a transaction whose snapshot
  is older than that is refused with TOO_OLD. Without open snapshots the history is empty;
- at most one sync runs; a caller waits for one that began after its own commit.

A plain commit survives the death of the process. `durable` waits for stable storage.
"""

import asyncio
import struct
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, TypeVar

from emberfs.kv.history import Commit, History, ReadSet, WriteSet
from emberfs.kv.keys import STAMP_KEY
from emberfs.kv.store import Change, OrderedStore, Range, Row, View
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, US, MiB
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.runtime.tasks import TaskSet

T = TypeVar("T")

TRIES_MAX = 50
RETRY_FIRST_NS = 200 * US
RETRY_MAX_NS = 20 * MS
HISTORY_KEYS_MAX = 50_000
TRANSACTION_BYTES_MAX = 16 * MiB

_RETRYABLE = (Code.CONFLICT, Code.TOO_OLD)
_COUNTER = struct.Struct("<q")
_STAMP = struct.Struct(">QH")


def pack_counter(value: int) -> bytes:
    """Encode what `Transaction.add` keeps: a little-endian int64."""
    return _COUNTER.pack(value)


def unpack_counter(value: bytes | None) -> int:
    """Decode a counter; an absent one is 0."""
    count: int = _COUNTER.unpack(value)[0] if value else 0
    return count


def pack_stamp(version: int) -> bytes:
    """Encode what `Transaction.stamp` appends: STAMP_BYTES in the order of commits."""
    return _STAMP.pack(version, 0)


class Transaction:
    """Reads a snapshot, sees its own writes, and takes effect as a whole or not at all.

    This one reads the store of this process; remote.RemoteTransaction shares what it buffers.
    """

    __slots__ = (
        "_adds",
        "_clears",
        "_engine",
        "_open",
        "_read_keys",
        "_read_only",
        "_read_ranges",
        "_stamps",
        "_version",
        "_view",
        "_viewing",
        "_write_ranges",
        "_writes",
        "origin",
    )

    def __init__(self, engine: "Engine", *, read_only: bool = False) -> None:
        self._engine = engine
        self._prepare(read_only)

    def _prepare(self, read_only: bool) -> None:
        self._read_only = read_only
        self._open = True
        self._view: View | None = None  # taken at the first read
        self._viewing = False  # counted by the engine as a reader
        self._version = 0
        self._writes: dict[bytes, bytes | None] = {}
        self._adds: dict[bytes, int] = {}
        self._clears: list[Range] = []
        self._read_keys: set[bytes] = set()
        self._read_ranges: list[Range] = []
        self._write_ranges: list[Range] = []
        self._stamps: dict[bytes, bytes] = {}
        self.origin = 0  # the client on whose behalf it writes, where that is known

    # ------------------------------------------------------------ reading

    async def get(self, key: bytes, snapshot: bool = False) -> bytes | None:
        """Return the value. With `snapshot` a later change of it does not fail the commit."""
        if key in self._writes:
            return self._writes[key]
        if self._stamps:
            self._refuse_stamped(key, key + b"\0")
        if self._clears and self._is_cleared(key):
            return None
        if not (snapshot or self._read_only):
            self._read_keys.add(key)
        value = (self._view or self._begin()).get(key)
        if key in self._adds:
            value = pack_counter(unpack_counter(value) + self._adds[key])
        return value

    async def get_many(self, keys: Sequence[bytes], snapshot: bool = False) -> list[bytes | None]:
        """Return the values in the order of the keys."""
        if self._writes or self._clears or self._adds or self._stamps:
            return [await self.get(key, snapshot) for key in keys]
        if not (snapshot or self._read_only):
            self._read_keys.update(keys)
        return (self._view or self._begin()).get_many(keys)

    async def get_range(
        self,
        start: bytes,
        stop: bytes,
        limit: int = 0,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> list[Row]:
        """Return the rows of [start, stop), at most `limit` if that is not 0.

        The conflict range ends at the last key returned when the limit cut the answer.
        """
        if start >= stop:
            return []
        if self._stamps:
            self._refuse_stamped(start, stop)
        view = self._view or self._begin()
        if self._writes or self._clears or self._adds:
            rows = self._merged(view, start, stop, limit, reverse)
        else:
            rows = view.scan(start, stop, limit=limit, reverse=reverse)
        if not (snapshot or self._read_only):
            if limit and len(rows) == limit:
                last = rows[-1][0]
                start, stop = (last, stop) if reverse else (start, last + b"\0")
            self._read_ranges.append((start, stop))
        return rows

    def _begin(self) -> View:
        assert self._open, "a transaction was used after its end"
        self._view, self._version = self._engine.open_view()
        self._viewing = True
        return self._view

    def _is_cleared(self, key: bytes) -> bool:
        return any(start <= key < stop for start, stop in self._clears)

    def _merged(
        self, view: View, start: bytes, stop: bytes, limit: int, reverse: bool
    ) -> list[Row]:
        """Rows of the store that own writes do not hide, merged with the own writes."""
        own = {k: v for k, v in self._writes.items() if start <= k < stop and v is not None}
        for key, delta in self._adds.items():
            if start <= key < stop:
                own[key] = pack_counter(unpack_counter(view.get(key)) + delta)
        # Every own write hides at most one row; cleared ranges may hide many: read on then.
        page = limit + len(self._writes) + len(self._adds) if limit else 0
        rows: list[Row] = []
        low, high = start, stop
        while low < high:
            found = view.scan(low, high, limit=page, reverse=reverse)
            rows += [row for row in found if self._shows(row[0])]
            if not page or len(found) < page or len(rows) >= limit:
                break
            low, high = (low, found[-1][0]) if reverse else (found[-1][0] + b"\0", high)
        rows = sorted([*rows, *own.items()], reverse=reverse)
        return rows[:limit] if limit else rows

    def _shows(self, key: bytes) -> bool:
        return not (key in self._writes or key in self._adds or self._is_cleared(key))

    # ------------------------------------------------------------ writing

    def set(self, key: bytes, value: bytes) -> None:
        """Write a value at commit."""
        self._refuse_read_only()
        self._adds.pop(key, None)
        if self._stamps:
            self._stamps.pop(key, None)
        self._writes[key] = value

    def clear(self, key: bytes) -> None:
        """Delete a key at commit."""
        self._refuse_read_only()
        self._adds.pop(key, None)
        if self._stamps:
            self._stamps.pop(key, None)
        self._writes[key] = None

    def clear_range(self, start: bytes, stop: bytes) -> None:
        """Delete [start, stop) at commit. Not for hot paths: range tombstones slow scans down."""
        self._refuse_read_only()
        if start >= stop:
            return
        buffers: tuple[dict[bytes, Any], ...] = (self._writes, self._adds, self._stamps)
        for own in buffers:
            for key in [k for k in own if start <= k < stop]:
                del own[key]
        self._clears.append((start, stop))

    def add(self, key: bytes, delta: int) -> None:
        """Add to an int64 counter at commit, without reading it: adds never conflict."""
        self._refuse_read_only()
        if key in self._writes:
            self._writes[key] = pack_counter(unpack_counter(self._writes[key]) + delta)
        elif self._is_cleared(key):
            self._writes[key] = pack_counter(delta)
        else:
            self._adds[key] = self._adds.get(key, 0) + delta

    def stamp(self, key: bytes, prefix: bytes = b"") -> None:
        """Write `prefix` and STAMP_BYTES that are greater the later a transaction commits.

        The value is not known before the commit: to read it in the same transaction is INVALID.
        """
        self._refuse_read_only()
        self._adds.pop(key, None)
        self._writes.pop(key, None)
        self._stamps[key] = prefix

    def add_read_conflict(self, start: bytes, stop: bytes) -> None:
        """Fail the commit if [start, stop) was written since the snapshot."""
        if self._view is None:
            self._begin()
        self._read_ranges.append((start, stop))

    def add_write_conflict(self, start: bytes, stop: bytes) -> None:
        """Make transactions that read [start, stop) fail as if it was written here."""
        self._refuse_read_only()
        self._write_ranges.append((start, stop))

    @property
    def written_keys(self) -> Collection[bytes]:
        """Keys that are set or cleared one by one; also after the commit."""
        return self._writes.keys()

    @property
    def changes_something(self) -> bool:
        """True once anything would be written."""
        return bool(
            self._writes or self._adds or self._clears or self._write_ranges or self._stamps
        )

    def _refuse_stamped(self, start: bytes, stop: bytes) -> None:
        if any(start <= key < stop for key in self._stamps):
            raise EmberfsError(Code.INVALID, "a stamp is not known before its commit")

    def _refuse_read_only(self) -> None:
        if self._read_only:
            raise EmberfsError(Code.READ_ONLY, "a read-only transaction cannot write")

    # ------------------------------------------------------------ the end

    async def commit(self) -> int:
        """Take effect; returns the version. CONFLICT or TOO_OLD: begin anew (Engine.run does)."""
        return self.commit_now()

    def commit_now(self) -> int:
        """As commit, for callers that are not coroutines. The critical section has no awaits."""
        assert self._open, "a transaction was used after its end"
        try:
            if not self.changes_something:
                return self._version
            read: ReadSet | None = None
            if self._viewing:
                read = ReadSet(self._version, self._read_keys, self._read_ranges)
                self._view = None  # a live view makes the store save every row that we replace
            written = WriteSet(
                self._writes, self._adds, self._clears, self._write_ranges, self._stamps
            )
            return self._engine.apply(read, written)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Forget everything; harmless after a commit."""
        if self._open:
            self._open = False
            self._view = None
            if self._viewing:
                self._engine.close_view()


class Engine:
    """Transactions on one store. Not thread-safe: one event loop owns it."""

    def __init__(
        self, env: Env, store: OrderedStore, *, history_keys_max: int = HISTORY_KEYS_MAX
    ) -> None:
        self._env = env
        self._store = store
        self._version = 1
        self._synced = 0  # everything up to this version is stable
        self._views = 0
        self._history = History(history_keys_max)
        self._tasks = TaskSet()
        self._waiting: list[asyncio.Future[None]] = []
        self._syncing = False
        self._watchers: dict[bytes, set[asyncio.Future[None]]] = {}
        self.conflicts = 0  # commits refused so far

    def begin(self, *, read_only: bool = False) -> Transaction:
        """Start a transaction by hand; `run` is what one usually wants."""
        return Transaction(self, read_only=read_only)

    async def run(
        self,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        read_only: bool = False,
        durable: bool = False,
    ) -> T:
        """Run `work` in a transaction and commit it, again from the start when it conflicts.

        `work` must have no effect outside its transaction. After TRIES_MAX tries: CONFLICT. With
        `durable` the answer comes when it, and everything before it, is on stable storage.
        """
        backoff: Backoff | None = None
        for _ in range(TRIES_MAX):
            transaction = Transaction(self, read_only=read_only)
            try:
                result = await work(transaction)
                transaction.commit_now()
                break
            except EmberfsError as problem:
                if problem.code not in _RETRYABLE:
                    raise
            finally:
                transaction.cancel()
            backoff = backoff or Backoff(RETRY_FIRST_NS, RETRY_MAX_NS)
            await self._env.sleep_ns(backoff.next_ns(self._env.random))
        else:
            raise EmberfsError(
                Code.CONFLICT, f"a transaction conflicted {TRIES_MAX} times; try again later"
            )
        if durable:
            await self.sync()
        return result

    async def watch(self, key: bytes, seen: bytes | None) -> bytes | None:
        """Return the value of a key as soon as it is another one than `seen`."""
        while (value := self._store.get(key)) == seen:
            watcher = asyncio.get_running_loop().create_future()
            watchers = self._watchers.setdefault(key, set())
            watchers.add(watcher)
            try:
                await watcher
            finally:
                watchers.discard(watcher)
                if not watchers and self._watchers.get(key) is watchers:
                    del self._watchers[key]
        return value

    async def sync(self) -> None:
        """Wait until everything committed so far is stable. Callers share syncs."""
        if self._synced >= self._version:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        if not self._syncing:
            self._syncing = True
            self._tasks.spawn(self._sync_waiting(), name="kv sync")
        await waiter

    async def _sync_waiting(self) -> None:
        """Serve whoever waits. Whoever comes during a sync shares the next one."""
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                version = self._version
                problem: Exception | None = None
                try:
                    await self._env.run_blocking(self._store.sync)
                    self._synced = max(self._synced, version)
                except Exception as found:  # whatever it is, the waiters must hear of it
                    problem = found
                for waiter in waiting:
                    _resolve(waiter, problem)
        finally:
            self._syncing = False

    async def close(self) -> None:
        """Wait for a running sync, then release the store."""
        await self._tasks.drain()
        self._store.close()

    # ------------------------------------------------------------ for Transaction

    def open_view(self) -> tuple[View, int]:
        """Return a snapshot and its version; `close_view` must follow."""
        view = self._store.snapshot()
        self._views += 1
        return view, self._version

    def close_view(self) -> None:
        """Count a snapshot out. The last one takes the history with it: nobody can conflict."""
        self._views -= 1
        assert self._views >= 0
        if self._views == 0:
            self._history.clear(self._version)

    def apply(self, read: ReadSet | None, written: WriteSet) -> int:
        """Validate and write: the critical section of a commit."""
        if read is not None and read.version != self._version:
            self._validate(read)
        changes: list[Change] = list(written.writes.items())
        for key, delta in written.adds.items():
            changes.append((key, pack_counter(unpack_counter(self._store.get(key)) + delta)))
        if written.stamps:
            changes += self._stamped(written.stamps)
        size = sum(len(key) + len(value or b"") for key, value in changes)
        if size > TRANSACTION_BYTES_MAX:
            raise EmberfsError(
                Code.TRANSACTION_TOO_LARGE, f"a transaction of {size} bytes; split it"
            )
        self._store.write(changes, written.clears)
        self._version += 1
        if self._watchers:
            self._tell_watchers(changes, written.clears)
        if self._views:
            keys = tuple(key for key, _ in changes)
            ranges = (*written.clears, *written.ranges)
            self._history.append(Commit(self._version, keys, ranges))
        return self._version

    def _stamped(self, stamps: dict[bytes, bytes]) -> list[Change]:
        """A counter in the store, as versions begin anew with every process."""
        number = unpack_counter(self._store.get(STAMP_KEY)) + 1
        rows = [(key, prefix + pack_stamp(number)) for key, prefix in stamps.items()]
        return [*rows, (STAMP_KEY, pack_counter(number))]

    def _tell_watchers(self, changes: list[Change], clears: Sequence[Range]) -> None:
        touched = [key for key, _ in changes if key in self._watchers]
        for start, stop in clears:
            touched += [key for key in self._watchers if start <= key < stop]
        for key in touched:
            for watcher in self._watchers[key]:
                _resolve(watcher, None)

    def _validate(self, read: ReadSet) -> None:
        if read.version < self._history.forgotten:
            self.conflicts += 1
            raise EmberfsError(Code.TOO_OLD, "a transaction outlived the write history")
        if self._history.conflicts(read):
            self.conflicts += 1
            raise EmberfsError(Code.CONFLICT, "something that was read has changed meanwhile")


def _resolve(waiter: asyncio.Future[None], problem: Exception | None) -> None:
    if waiter.done():  # its task was cancelled
        return
    if problem is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(problem)
