"""Deferred deletion: the chunks of files that have neither name nor session.

Crash windows: the inode leaves and its deletion record comes in one transaction; chunks go only
after that is on stable storage (else a power cut could bring the name back without its data); the
record goes last. Removing chunks twice is harmless, so several servers may be at it; they divide
the queue. But the end of a cut (trims.py) could bring a chunk back: a file that was being cut when
it was deleted is left to the server that cut it, while that may go on.
"""

import asyncio
import logging
from collections import deque
from typing import NamedTuple

from emberfs.client.unflushed import ChainVersions
from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.meta import schema
from emberfs.meta.metrics import DELETED, DELETED_WAITING
from emberfs.meta.tenure import Tenure
from emberfs.meta.trims import Chunks, Trims, make_stable
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import MS, SECOND, InodeId
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.meta.collect")

BATCH_ROWS = 64
FILES_AT_ONCE = 8
CHUNK_TIMEOUT_NS = 30 * SECOND
IDLE_NS = 1 * SECOND
FULL_PASS_TICKS = 60
LATE_PASS_TICKS = 5
LATE_NS = 30 * SECOND  # a row may come that late, after others of its time
RETRY_FIRST_NS = 200 * MS
RETRY_MAX_NS = 30 * SECOND


class _Failed(NamedTuple):
    """A file whose chunks could not be removed yet."""

    backoff: Backoff
    again_ns: int


class Collector:
    """Works through the deletion queue, for ever."""

    def __init__(
        self, env: Env, engine: Engine, chunks: Chunks, trims: Trims, tenure: Tenure
    ) -> None:
        self._env = env
        self._engine = engine
        self._chunks = chunks
        self._trims = trims
        self._tenure = tenure
        self._failed: dict[InodeId, _Failed] = {}
        # No row lies before it: spares the scan all the rows that were deleted. Now and then the
        # queue is read from where that was some time ago, for rows of transactions that took long,
        # and from its beginning, for rows made while the time of day stepped back.
        self._first = keys.span_of(keys.Prefix.DELETED.value).start
        self._firsts: deque[tuple[int, bytes]] = deque([(env.now_ns(), self._first)])
        self._woken = asyncio.Event()
        self._tasks = TaskSet()

    def start(self) -> None:
        """Begin to collect in the background."""
        self._tasks.spawn(self._live(), name="meta collector")
        self._tasks.spawn(self._tick(), name="meta collector clock")

    async def close(self) -> None:
        """Stop; the queue stays."""
        await self._tasks.close()

    def wake(self) -> None:
        """Something may have been deleted."""
        self._woken.set()

    async def collect(self) -> int:
        """Go through the queue once; returns how many files are gone for good."""
        stop = keys.span_of(keys.Prefix.DELETED.value).stop
        start, left, gone = self._first, b"", 0
        while True:
            rows = await self._rows(start, stop)
            due = [row for row in rows if self._is_due(_inode_of(row)) and self._is_ours(row)]
            if due:
                await self._engine.sync()
            done = await self._collect_batch(due)
            gone += len(done)
            left = left or next((key for key, _ in rows if key not in done), b"")
            if rows:
                start = rows[-1][0] + b"\0"
            if len(rows) < BATCH_ROWS:
                break
        self._first = left or start
        DELETED_WAITING.set(len(self._failed))
        return gone

    async def _rows(self, start: bytes, stop: bytes) -> list[tuple[bytes, bytes]]:
        async def scan(txn: Transaction) -> list[tuple[bytes, bytes]]:
            return await txn.get_range(start, stop, limit=BATCH_ROWS)

        return await self._engine.run(scan, read_only=True)

    def _is_due(self, inode: InodeId) -> bool:
        failed = self._failed.get(inode)
        return failed is None or failed.again_ns <= self._env.now_ns()

    def _is_ours(self, row: tuple[bytes, bytes]) -> bool:
        """Tell whether this server is to do it; not while another may be cutting the file yet."""
        cutter = schema.DELETED.decode(row[1]).cutter
        if cutter is not None and cutter.incarnation == self._tenure.incarnation:
            return True
        if cutter is not None and not self._tenure.is_over(cutter):
            return False
        return self._tenure.is_mine(_inode_of(row))

    async def _collect_batch(self, rows: list[tuple[bytes, bytes]]) -> set[bytes]:
        gate = asyncio.Semaphore(FILES_AT_ONCE)

        async def one(row: tuple[bytes, bytes]) -> tuple[bytes, ChainVersions] | None:
            async with gate:
                removed = await self._remove_chunks(row)
                return None if removed is None else (row[0], removed)

        removed = [found for found in await asyncio.gather(*map(one, rows)) if found is not None]
        done = {key for key, _ in removed}
        if not await make_stable(self._chunks, CHUNK_TIMEOUT_NS, *[some for _, some in removed]):
            done = set()  # some may be there again: the rows stay, and all is looked at once more

        async def forget(txn: Transaction) -> None:
            for key in sorted(done):
                txn.clear(key)

        if done:
            await self._engine.run(forget)
            DELETED.inc(len(done))
        return done

    async def _remove_chunks(self, row: tuple[bytes, bytes]) -> ChainVersions | None:
        """Name the chains where there were chunks; None if it did not succeed."""
        inode = _inode_of(row)
        layout = schema.DELETED.decode(row[1]).layout
        await self._trims.settled(inode)  # a late cut could bring a chunk back
        try:
            removed = await self._chunks.remove_chunks(inode, layout, 0, CHUNK_TIMEOUT_NS)
        except EmberfsError as problem:
            self._note_failure(inode, problem)
            return None
        self._failed.pop(inode, None)
        return removed

    def _note_failure(self, inode: InodeId, problem: EmberfsError) -> None:
        failed = self._failed.get(inode)
        backoff = failed.backoff if failed else Backoff(RETRY_FIRST_NS, RETRY_MAX_NS)
        pause_ns = backoff.next_ns(self._env.random)
        self._failed[inode] = _Failed(backoff, self._env.now_ns() + pause_ns)
        log.info("chunks of deleted file %d stay for now: %s", inode, problem)

    async def _live(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self.collect()
            except EmberfsError as problem:
                log.warning("collecting deleted files: %s", problem)
                await self._env.sleep_ns(IDLE_NS)
            await self._woken.wait()
            await self._env.sleep_ns(20 * MS)  # let deletions gather: they share a sync

    async def _tick(self) -> None:
        ticks = 0
        while True:
            await self._env.sleep_ns(IDLE_NS)
            ticks += 1
            self._firsts.append((self._env.now_ns(), self._first))
            if ticks % FULL_PASS_TICKS == 0:
                self._first = keys.span_of(keys.Prefix.DELETED.value).start
            elif ticks % LATE_PASS_TICKS == 0:
                self._first = min(self._first, self._first_of_before())
            self._woken.set()

    def _first_of_before(self) -> bytes:
        while len(self._firsts) > 1 and self._firsts[1][0] <= self._env.now_ns() - LATE_NS:
            self._firsts.popleft()
        return self._firsts[0][1]


def _inode_of(row: tuple[bytes, bytes]) -> InodeId:
    return InodeId(keys.unpack_inode_suffix(row[0]))
