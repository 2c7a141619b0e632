"""Transactions at a server: what every distributed engine shares.

The client's side of a transaction is here: own writes are seen, what was read is recorded, adds
become shares, limits are checked, and a lost answer of a commit is cleared up (slots.py). Backends
only read at one moment, and commit if nothing that was read has changed.

Invariants:
- `run` returns only what was committed, exactly once, and raises CONFLICT only if nothing was;
- MAYBE_COMMITTED is raised only after PATIENCE without a server; no later transaction of this
  engine begins before that outcome is known, so it cannot take effect behind one's back.

Every commit is on stable storage of the server, as far as that is configured to be.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TypeVar

from emberfs.kv import slots, tidy
from emberfs.kv.backend import AwayError, Backend, Limits
from emberfs.kv.history import ReadSet, WriteSet
from emberfs.kv.slots import Doubt, Slots
from emberfs.kv.store import Range, Row
from emberfs.kv.transaction import TRIES_MAX, Transaction, pack_counter, unpack_counter
from emberfs.kv.turns import Turns
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.runtime.tasks import TaskSet

T = TypeVar("T")

PATIENCE_NS = 15 * SECOND  # without a server, before a transaction is given up
RETRY_FIRST_NS = 1 * MS
RETRY_MAX_NS = 20 * MS
AWAY_MAX_NS = 300 * MS

_RETRYABLE = (Code.CONFLICT, Code.TOO_OLD)


class RemoteTransaction(Transaction):
    """See Transaction. Its own writes lie here, the rest at the server."""

    __slots__ = ("_attempt", "_explicit", "_remote", "_slot", "doubt")

    def __init__(self, engine: "RemoteEngine", *, read_only: bool) -> None:
        self._prepare(read_only)
        self._remote = engine
        self._slot = None if read_only else engine.slots.take()
        self._attempt = engine.backend.attempt(read_only=read_only)
        self._explicit: list[Range] = []  # conflict ranges without a read
        self.doubt: Doubt | None = None  # set when a commit raises MAYBE_COMMITTED

    # ------------------------------------------------------------ reading

    async def get(self, key: bytes, snapshot: bool = False) -> bytes | None:
        """See Transaction."""
        return (await self.get_many((key,), snapshot))[0]

    async def get_many(self, keys: Sequence[bytes], snapshot: bool = False) -> list[bytes | None]:
        """See Transaction."""
        assert self._open, "a transaction was used after its end"
        for key in keys if self._stamps else ():
            self._refuse_stamped(key, key + b"\0")
        asked = [k for k in keys if k not in self._writes and not self._is_cleared(k)]
        found = dict(zip(asked, await self._read(asked, snapshot), strict=True)) if asked else {}
        values: list[bytes | None] = []
        for key in keys:
            value = found.get(key, self._writes.get(key))
            if key in self._adds:
                value = pack_counter(unpack_counter(value) + self._adds[key])
            values.append(value)
        return values

    async def _read(self, keys: Sequence[bytes], snapshot: bool) -> list[bytes | None]:
        """Read from the server, counters with their shares."""
        if not (snapshot or self._read_only):
            self._read_keys.update(keys)
        values = await self._attempt.get_many(keys)
        for place, key in enumerate(keys):
            if slots.is_counter(key):
                span = slots.share_span(key)
                self._depend(*span, snapshot)
                shares = await self._attempt.scan(*span, 0, False)
                if shares:
                    parts = [unpack_counter(value) for _, value in shares]
                    values[place] = pack_counter(unpack_counter(values[place]) + sum(parts))
        return values

    def _depend(self, start: bytes, stop: bytes, snapshot: bool) -> None:
        if not (snapshot or self._read_only):
            self._read_ranges.append((start, stop))

    async def get_range(
        self,
        start: bytes,
        stop: bytes,
        limit: int = 0,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> list[Row]:
        """See Transaction."""
        assert self._open, "a transaction was used after its end"
        if self._stamps:
            self._refuse_stamped(start, stop)
        rows: list[Row] = []
        parts = _around_counters(start, stop)
        for low, high in reversed(parts) if reverse else parts:
            left = limit - len(rows) if limit else 0
            if slots.is_counter(low):
                found = await self._counters(low, high, snapshot)
                rows += found[::-1] if reverse else found
            else:
                rows += await self._rows(low, high, left, reverse, snapshot)
            if limit and len(rows) >= limit:
                return rows[:limit]
        return rows

    async def _counters(self, start: bytes, stop: bytes, snapshot: bool) -> list[Row]:
        """All counters of a range; those without a row of their own have shares."""
        self._depend(start, stop, snapshot)
        self._depend(*slots.SHARES, snapshot)
        names = {key for key, _ in await self._attempt.scan(start, stop, 0, False)}
        shares = await self._attempt.scan(*slots.SHARES, 0, False)
        names.update(slots.counter_of(key) for key, _ in shares)
        names.update(self._writes, self._adds)
        chosen = sorted(key for key in names if start <= key < stop)
        values = await self.get_many(chosen, snapshot)
        return [(k, v) for k, v in zip(chosen, values, strict=True) if v is not None]

    async def _rows(
        self, start: bytes, stop: bytes, limit: int, reverse: bool, snapshot: bool
    ) -> list[Row]:
        own = {k: v for k, v in self._writes.items() if start <= k < stop and v is not None}
        for key in [key for key in self._adds if start <= key < stop]:
            value = await self.get(key, snapshot)
            assert value is not None
            own[key] = value
        page = limit + len(self._writes) + len(self._adds) if limit else 0
        rows: list[Row] = []
        low, high = start, stop
        while low < high:
            found = await self._attempt.scan(low, high, page, reverse)
            rows += [row for row in found if self._shows(row[0])]
            if not page or len(found) < page or len(rows) >= limit:
                break
            low, high = (low, found[-1][0]) if reverse else (found[-1][0] + b"\0", high)
        rows = sorted([*rows, *own.items()], reverse=reverse)
        if limit and len(rows) >= limit:
            rows = rows[:limit]
            last = rows[-1][0]
            start, stop = (last, stop) if reverse else (start, last + b"\0")
        self._depend(start, stop, snapshot)
        return rows

    def add_read_conflict(self, start: bytes, stop: bytes) -> None:
        """See Transaction. Not every engine can depend on what it does not read: read it then."""
        self._explicit.append((start, stop))

    @property
    def version(self) -> int:
        """Of the moment that is read."""
        return self._attempt.version

    @property
    def contended(self) -> set[bytes]:
        """The rows that were both read and written here."""
        return self._read_keys & self._writes.keys()

    # ------------------------------------------------------------ the end

    def commit_now(self) -> int:
        """Not possible here."""
        raise NotImplementedError("a server is waited for: use commit()")

    async def commit(self) -> int:
        """See Transaction. Also AwayError: nothing happened; MAYBE_COMMITTED: see `doubt`."""
        assert self._open, "a transaction was used after its end"
        try:
            if not self.changes_something:
                await self._attempt.finish()
                return self._attempt.version
            assert self._slot is not None
            for start, stop in self._explicit:
                await self._attempt.scan(start, stop, 0, False)
                self._read_ranges.append((start, stop))
            token = self._remote.slots.new_token()
            written = await self._written(token)
            read = ReadSet(self._attempt.version, self._read_keys, self._read_ranges)
            _check_limits(self._remote.backend.limits, read, written)
            try:
                return await self._attempt.commit(read, written)
            except BaseException as problem:
                known = isinstance(problem, EmberfsError) and problem.code != Code.MAYBE_COMMITTED
                if not known:  # cancelled, for example
                    self.doubt = Doubt(self._slot, token)
                    self._remote.slots.doubts.append(self.doubt)
                    self._slot = None
                raise
        finally:
            self.cancel()

    async def _written(self, token: bytes) -> WriteSet:
        """What the server is to write: adds, touches and the slot's row as plain rows."""
        assert self._slot is not None
        writes, clears = dict(self._writes), [_beyond_engine(*span) for span in self._clears]
        # What was set is all: no share counts any more.
        clears += [slots.share_span(key) for key in self._writes if slots.is_counter(key)]
        for start, stop in self._clears:
            clears += _shares_between(start, stop)
        for key, delta in self._adds.items():
            row = self._slot.share(key) if slots.is_counter(key) else key
            cleared = any(start <= row < stop for start, stop in clears)
            value = None if cleared else (await self._attempt.get_many((row,)))[0]
            self._read_keys.add(row)
            writes[row] = pack_counter(unpack_counter(value) + delta)
        for start, stop in self._write_ranges:
            if stop != start + b"\0":
                raise EmberfsError(
                    Code.UNSUPPORTED, "a write conflict on this engine is of a single key"
                )
            if start not in writes and not self._is_cleared(start):
                writes[start] = (await self._attempt.get_many((start,)))[0]
                self._read_keys.add(start)
        self._read_keys.add(self._slot.key)
        writes[self._slot.key] = self._remote.slots.row(token)
        return WriteSet(writes, {}, clears, [], self._stamps)

    def cancel(self) -> None:
        """See Transaction."""
        if self._open:
            self._open = False
            self._attempt.cancel()
            if self._slot is not None:
                self._remote.slots.give(self._slot)
                self._slot = None


def _around_counters(start: bytes, stop: bytes) -> list[Range]:
    """Divide a range so that counters are apart."""
    start, stop = _beyond_engine(start, stop)
    low, high = slots.COUNTERS
    parts = [
        (start, min(stop, low)),
        (max(start, low), min(stop, high)),
        (max(start, high), stop),
    ]
    return [(first, last) for first, last in parts if first < last]


def _beyond_engine(start: bytes, stop: bytes) -> Range:
    """Leave out what engines keep for themselves."""
    return max(start, slots.ENGINE_ROWS.stop), stop


def _shares_between(start: bytes, stop: bytes) -> list[Range]:
    """Where the shares of the counters of a range lie."""
    low, high = max(start, slots.COUNTERS.start), min(stop, slots.COUNTERS.stop)
    head = slots.SHARES.start
    return [(head + low, head + high)] if low < high else []


def _check_limits(limits: Limits, read: ReadSet, written: WriteSet) -> None:
    size = rows = 0
    for key, value in (*written.writes.items(), *written.stamps.items()):
        rows += 1
        size += len(key) + len(value or b"")
        if len(key) > limits.key_bytes or len(value or b"") > limits.value_bytes:
            raise EmberfsError(
                Code.TRANSACTION_TOO_LARGE,
                f"a row of {len(key)} + {len(value or b'')} bytes; this store takes keys of "
                f"{limits.key_bytes} and values of {limits.value_bytes}",
            )
    depends = len(read.keys) + len(read.ranges)
    if size > limits.transaction_bytes or max(rows, depends) > limits.rows:
        raise EmberfsError(
            Code.TRANSACTION_TOO_LARGE,
            f"a transaction of {rows} rows and {size} bytes that depends on {depends} reads; this "
            f"store takes {limits.rows} of each and {limits.transaction_bytes} bytes: split it",
        )


class RemoteEngine:
    """An engine before a backend. Not thread-safe: one event loop owns it."""

    def __init__(self, env: Env, backend: Backend, *, patience_ns: int = PATIENCE_NS) -> None:
        self.backend = backend
        self.slots = Slots(env)
        self.conflicts = 0
        self._env = env
        self._patience_ns = patience_ns
        self._turns = Turns()
        self._settling = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._opened = False
        self._tasks = TaskSet()

    async def open(self) -> None:
        """Check the server; `run` does it too. AwayError, or EmberfsError as Backend.open."""
        async with self._opening:
            if not self._opened:
                await self.backend.open()
                self._opened = True
                self._tasks.spawn(tidy.live(self._env, self.backend), name="kv tidy")

    def begin(self, *, read_only: bool = False) -> RemoteTransaction:
        """See transaction.Engine. Only once it is open."""
        return RemoteTransaction(self, read_only=read_only)

    async def run(
        self,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        read_only: bool = False,
        durable: bool = False,
    ) -> T:
        """See transactions.Transactions. UNREACHABLE: no server for PATIENCE, nothing happened."""
        crowd, away = Backoff(RETRY_FIRST_NS, RETRY_MAX_NS), Backoff(RETRY_FIRST_NS, AWAY_MAX_NS)
        tries, answered_ns = 0, self._env.now_ns()
        async with AsyncExitStack() as held:
            while True:
                txn: RemoteTransaction | None = None
                try:
                    if not self._opened:
                        await self.open()
                    await self.settle_doubts()
                    txn = self.begin(read_only=read_only)
                    return await self._once(txn, work)
                except AwayError:
                    if self._env.now_ns() - answered_ns > self._patience_ns:
                        raise
                    pause_ns = away.next_ns(self._env.random)
                except EmberfsError as problem:
                    if problem.code not in _RETRYABLE:
                        raise
                    tries, answered_ns = tries + 1, self._env.now_ns()
                    self.conflicts += 1
                    if tries == TRIES_MAX:
                        break
                    pause_ns = crowd.next_ns(self._env.random)
                await self._env.sleep_ns(pause_ns)
                if txn is not None:
                    await held.aclose()
                    await held.enter_async_context(self._turns.take(txn.contended))
        raise EmberfsError(
            Code.CONFLICT, f"a transaction conflicted {TRIES_MAX} times; try again later"
        )

    async def _once(self, txn: RemoteTransaction, work: Callable[[Transaction], Awaitable[T]]) -> T:
        try:
            result = await work(txn)
            try:
                await txn.commit()
            except EmberfsError as problem:
                if problem.code != Code.MAYBE_COMMITTED or txn.doubt is None:
                    raise
                if not await self._settle_in_time(txn.doubt):
                    raise EmberfsError(Code.CONFLICT, "a commit did not arrive") from None
            return result
        finally:
            txn.cancel()

    # ------------------------------------------------------------ lost answers

    async def settle_doubts(self) -> None:
        """Find out what became of every commit whose answer was lost. AwayError if it cannot."""
        while self.slots.doubts:
            await self._settle(self.slots.doubts[0])

    async def _settle_in_time(self, doubt: Doubt) -> bool:
        """Tell whether it was committed. MAYBE_COMMITTED after PATIENCE."""
        backoff = Backoff(RETRY_FIRST_NS, AWAY_MAX_NS)
        deadline_ns = self._env.now_ns() + self._patience_ns
        while True:
            try:
                return await self._settle(doubt)
            except AwayError as problem:
                if self._env.now_ns() > deadline_ns:
                    raise EmberfsError(
                        Code.MAYBE_COMMITTED,
                        f"the store went away during a commit: {problem.message}",
                    ) from None
            await self._env.sleep_ns(backoff.next_ns(self._env.random))

    async def _settle(self, doubt: Doubt) -> bool:
        """Look at the slot; without the token there, make sure that it never comes."""
        async with self._settling:
            fence = self.slots.new_token()
            while doubt.committed is None:
                attempt = self.backend.attempt(read_only=False)
                try:
                    key = doubt.slot.key
                    token = slots.token_in((await attempt.get_many((key,)))[0])
                    if token == doubt.token:
                        doubt.committed = True
                    elif token == fence:
                        doubt.committed = False
                    else:
                        read = ReadSet(attempt.version, {key}, [])
                        row = self.slots.row(fence)
                        await attempt.commit(read, WriteSet({key: row}, {}, [], [], {}))
                        doubt.committed = False
                except EmberfsError as problem:
                    if problem.code not in (*_RETRYABLE, Code.MAYBE_COMMITTED):
                        raise
                    await self._env.sleep_ns(RETRY_FIRST_NS)
                finally:
                    attempt.cancel()
            if doubt in self.slots.doubts:
                self.slots.doubts.remove(doubt)
                self.slots.give(doubt.slot)
            return doubt.committed

    # ------------------------------------------------------------ the rest

    async def watch(self, key: bytes, seen: bytes | None) -> bytes | None:
        """See transaction.Engine."""
        while True:
            txn = self.begin(read_only=True)
            try:
                value, version = await txn.get(key), txn.version
                if value != seen:
                    return value
                await self.backend.await_write(key, version)
            except AwayError:
                await self._env.sleep_ns(AWAY_MAX_NS)
            finally:
                txn.cancel()

    async def sync(self) -> None:
        """Nothing to do: what was committed is stable."""

    async def close(self) -> None:
        """Release the server."""
        await self._tasks.close()
        await self.backend.close()
