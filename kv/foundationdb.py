"""FoundationDB as a transactional store, through its own Python binding.

Not tested where FoundationDB is not to be had: its client library (libfdb_c.so) and its server are
in no package registry. The conformance suite runs where EMBERFS_TEST_FDB names a cluster file.

The binding's futures call back from its own network thread; they wake the event loop here.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, TypeAlias

from emberfs.kv.backend import AwayError, Limits
from emberfs.kv.history import ReadSet, WriteSet
from emberfs.kv.store import Row
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS
from emberfs.runtime.env import Env

Untyped: TypeAlias = Any  # the binding has no types

API_VERSION = 710

# FoundationDB's own bounds are 10 kB, 100 kB and 10 MB; it asks to stay well below the last.
LIMITS = Limits(key_bytes=2048, value_bytes=100_000, transaction_bytes=5_000_000, rows=50_000)

POLL_NS = 100 * MS
_TIMEOUT_MS = 5000
_CONFLICT = (1020, 1037, 1039, 1213)  # not committed, too many processes behind, tag throttled
_TOO_OLD = (1007, 1009)
_MAYBE = (1021, 1025, 1031)  # result unknown, cancelled, timed out
_TOO_LARGE = (2101, 2102, 2103)


def _binding() -> Untyped:
    """Import the binding. EmberfsError(CONFIG) if it or the library is missing."""
    try:
        import fdb

        fdb.api_version(API_VERSION)
    except Exception as problem:  # the binding raises bare exceptions
        raise EmberfsError(
            Code.CONFIG,
            f"FoundationDB cannot be used here ({problem}): pip install 'emberfs[foundationdb]' "
            "and install foundationdb-clients, which brings libfdb_c.so",
        ) from None
    return fdb


class FoundationBackend:
    """A prefix in a FoundationDB cluster. Fits backend.Backend."""

    limits = LIMITS

    def __init__(self, env: Env, cluster_file: str, name: bytes) -> None:
        """EmberfsError(CONFIG) if the binding cannot be used."""
        self._env = env
        self.fdb = _binding()
        self._database = self.fdb.open(cluster_file)
        self.prefix = name + b"\0"

    async def open(self) -> None:
        """See Backend."""
        await self.attempt(read_only=True).get_many((b"\1",))

    def attempt(self, *, read_only: bool) -> "FoundationAttempt":
        """See Backend."""
        txn = self._database.create_transaction()
        txn.options.set_timeout(_TIMEOUT_MS)
        return FoundationAttempt(self.fdb, txn, self.prefix)

    async def await_write(self, key: bytes, version: int) -> None:
        """See Backend. Polls: a watch of FoundationDB's would hold a transaction."""
        await self._env.sleep_ns(POLL_NS)

    async def close(self) -> None:
        """See Backend. The binding closes itself with the process."""


class FoundationAttempt:
    """One transaction. Fits backend.Attempt.

    Reads are snapshot reads; what the commit depends on is told to FoundationDB then.
    """

    def __init__(self, fdb: Untyped, txn: Untyped, prefix: bytes) -> None:
        self._fdb = fdb
        self._txn = txn
        self._prefix = prefix
        self.version = 0

    async def _await(self, future: Untyped, *, wrote: bool = False) -> Untyped:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        future.on_ready(lambda _: loop.call_soon_threadsafe(done.set))
        await done.wait()
        try:
            return future.wait()
        except self._fdb.FDBError as problem:
            raise _explained(problem.code, str(problem.description), wrote=wrote) from None

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See Attempt."""
        futures = [self._txn.snapshot.get(self._prefix + key) for key in keys]
        for future in futures:
            await self._await(future)
        if not self.version:
            self.version = await self._await(self._txn.get_read_version())
        return [bytes(future.value) if future.present() else None for future in futures]

    async def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool) -> list[Row]:
        """See Attempt."""
        if start >= stop:
            return []
        selector = self._fdb.KeySelector.first_greater_or_equal
        low, high = self._prefix + start, self._prefix + stop
        rows: list[Row] = []
        iteration = 1
        while True:
            left = limit - len(rows) if limit else 0
            found, count, more = await self._await(
                self._txn.snapshot._get_range(
                    selector(low),
                    selector(high),
                    left,
                    self._fdb.StreamingMode.want_all,
                    iteration,
                    reverse,
                )
            )
            rows += [(bytes(row.key)[len(self._prefix) :], bytes(row.value)) for row in found]
            if not more or not count or (limit and len(rows) >= limit):
                return rows
            last = self._prefix + rows[-1][0]
            low, high = (low, last) if reverse else (last + b"\0", high)
            iteration += 1

    async def finish(self) -> None:
        """See Attempt. All was read at one version."""

    async def commit(self, read: ReadSet, written: WriteSet) -> int:
        """See Attempt."""
        txn, prefix = self._txn, self._prefix
        for key in read.keys:
            txn.add_read_conflict_key(prefix + key)
        for start, stop in read.ranges:
            if start < stop:
                txn.add_read_conflict_range(prefix + start, prefix + stop)
        for start, stop in written.clears:
            if start < stop:
                txn.clear_range(prefix + start, prefix + stop)
        for key, value in written.writes.items():
            if value is None:
                txn.clear(prefix + key)
            else:
                txn.set(prefix + key, value)
        for key, head in written.stamps.items():
            place = len(head).to_bytes(4, "little")
            txn.set_versionstamped_value(prefix + key, head + bytes(10) + place)
        await self._await(txn.commit(), wrote=True)
        return int(txn.get_committed_version())

    def cancel(self) -> None:
        """See Attempt."""
        self._txn.cancel()


def _explained(code: int, words: str, *, wrote: bool) -> EmberfsError:
    if code in _CONFLICT:
        return EmberfsError(Code.CONFLICT, "something that was read has changed meanwhile")
    if code in _TOO_OLD:
        return EmberfsError(Code.TOO_OLD, "a transaction outlived FoundationDB's five seconds")
    if code in _TOO_LARGE:
        return EmberfsError(Code.TRANSACTION_TOO_LARGE, f"FoundationDB: {words} ({code})")
    if wrote or code in _MAYBE:
        found = Code.MAYBE_COMMITTED if wrote else Code.UNREACHABLE
        words = f"FoundationDB: {words} ({code})"
        return EmberfsError(found, words) if wrote else AwayError(words)
    return EmberfsError(Code.CONFIG, f"FoundationDB refused a request: {words} ({code})")
