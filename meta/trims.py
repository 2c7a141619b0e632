"""Cutting the chunks of files that shrank.

Crash windows: the new length and the trim record are one transaction; chunks are cut only when it
is on stable storage; the record goes last, when the cut is stable, and for good, before anybody is
answered: a power cut that brought it back would repeat the cut on what was written since. Whenever
the server dies before, the trim is found again at the next start and repeated.

While a trim is pending, whoever would open the file, extend it or settle a length waits for it:
otherwise the cut could take data that was written after the file shrank.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

from emberfs.kv import keys
from emberfs.kv.transaction import Engine, Transaction
from emberfs.meta import schema
from emberfs.meta.metrics import TRIMS_PENDING
from emberfs.proto.errors import EmberfsError
from emberfs.proto.files import Inode, Layout
from emberfs.proto.ids import MS, SECOND, ChainId, InodeId
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.meta.trims")

CHUNK_TIMEOUT_NS = 10 * SECOND
SCAN_NS = 5 * SECOND
SCAN_ROWS = 256
TRIMS_AT_ONCE = 16


class Chunks(Protocol):
    """The part of client.chunkio.ChunkIO that metadata needs."""

    async def remove_chunks(
        self, inode: InodeId, layout: Layout, first_index: int, timeout_ns: int
    ) -> list[ChainId]:
        """Remove every chunk of the file from `first_index` on; returns the chains to flush."""
        ...

    async def write(
        self,
        inode: InodeId,
        layout: Layout,
        offset: int,
        data: memoryview,
        *,
        timeout_ns: int,
    ) -> None:
        """Write at `offset`; on return every chain has committed."""
        ...

    async def truncate_chunk(
        self, inode: InodeId, layout: Layout, index: int, length: int, timeout_ns: int
    ) -> list[ChainId]:
        """Cut a chunk to `length` bytes; returns the chains to flush."""
        ...

    async def flush(self, chains: Iterable[ChainId], timeout_ns: int) -> None:
        """Make what was done on these chains stable."""
        ...

    async def end_of(
        self, inode: InodeId, layout: Layout, first_index: int, timeout_ns: int
    ) -> int:
        """Return where the last chunk from `first_index` on ends, in the file; 0: no chunk."""
        ...

    async def inodes_on(
        self, chain: ChainId, first: InodeId, stop: InodeId, timeout_ns: int
    ) -> list[InodeId]:
        """Return the ids of [first, stop) that name chunks on a chain."""
        ...


async def cut_behind(txn: Transaction, inode: Inode, length: int) -> None:
    """Record that the file's chunks are to be cut at `length`; a caller that shrinks stores it."""
    assert inode.layout is not None
    key = keys.trim_key(inode.id)
    value = await txn.get(key)
    if value is not None:  # an earlier trim is still pending: one cut at the lower end does both
        length = min(length, schema.TRIM.decode(value).length)
    txn.set(key, schema.TRIM.encode(schema.Trim(length, inode.layout)))


class Trims:
    """Performs trims, one at a time per file."""

    def __init__(self, env: Env, engine: Engine, chunks: Chunks) -> None:
        self._env = env
        self._engine = engine
        self._chunks = chunks
        self._pending: set[InodeId] = set()
        self._running: dict[InodeId, asyncio.Task[EmberfsError | None]] = {}
        self._tasks = TaskSet()

    async def load(self) -> None:
        """Find the trims that an earlier life of the server left unfinished."""
        start, stop = keys.span_of(keys.Prefix.TRIM.value)
        while start < stop:
            rows = await self._rows(start, stop)
            self._pending.update(InodeId(keys.unpack_inode_suffix(key)) for key, _ in rows)
            start = rows[-1][0] + b"\0" if len(rows) == SCAN_ROWS else stop
        TRIMS_PENDING.set(len(self._pending))

    async def _rows(self, start: bytes, stop: bytes) -> list[tuple[bytes, bytes]]:
        async def scan(txn: Transaction) -> list[tuple[bytes, bytes]]:
            return await txn.get_range(start, stop, limit=SCAN_ROWS)

        return await self._engine.run(scan, read_only=True)

    def start(self) -> None:
        """Retry unfinished trims in the background."""
        self._tasks.spawn(self._live(), name="meta trims")

    async def close(self) -> None:
        """Stop; unfinished trims stay recorded."""
        await self._tasks.close()

    async def finish(self, inode: InodeId) -> None:
        """Return when no trim of this file is pending; raises what stopped it."""
        if inode not in self._pending:
            return
        # Not cancelled with the caller: a cut that is on its way must not be overtaken.
        problem = await asyncio.shield(self._task(inode))
        if problem is not None:
            raise EmberfsError(problem.code, f"truncating inode {inode}: {problem.message}")

    async def perform(self, inode: InodeId) -> None:
        """Perform the trim that a transaction may just have recorded for this file."""

        async def recorded(txn: Transaction) -> bool:
            return await txn.get(keys.trim_key(inode)) is not None

        if inode in self._pending or await self._engine.run(recorded, read_only=True):
            self._pending.add(inode)
            TRIMS_PENDING.set(len(self._pending))
            await self.finish(inode)

    async def settled(self, inode: InodeId) -> None:
        """Wait for a cut that is under way, whatever comes of it."""
        running = self._running.get(inode)
        if running is not None:
            await asyncio.shield(running)

    def _task(self, inode: InodeId) -> asyncio.Task[EmberfsError | None]:
        task = self._running.get(inode)
        if task is None or task.done():
            task = self._tasks.spawn(self._cut(inode), name=f"trim {inode}")
            self._running[inode] = task
        return task

    async def _cut(self, inode: InodeId) -> EmberfsError | None:
        """Cut until no record is left; returns what went wrong (the record then stays)."""
        key = keys.trim_key(inode)
        try:
            await self._engine.sync()
            while (value := await self._value(key)) is not None:
                await self._cut_chunks(inode, schema.TRIM.decode(value))
                await self._forget(key, value)
        except EmberfsError as problem:
            log.warning("trim of inode %d waits: %s", inode, problem)
            return problem
        self._pending.discard(inode)
        self._running.pop(inode, None)
        TRIMS_PENDING.set(len(self._pending))
        return None

    async def _value(self, key: bytes) -> bytes | None:
        async def read(txn: Transaction) -> bytes | None:
            return await txn.get(key)

        return await self._engine.run(read, read_only=True)

    async def _cut_chunks(self, inode: InodeId, trim: schema.Trim) -> None:
        index, rest = divmod(trim.length, trim.layout.chunk_bytes)
        chunks = self._chunks
        first = index + 1 if rest else index
        cut = await chunks.remove_chunks(inode, trim.layout, first, CHUNK_TIMEOUT_NS)
        if rest:
            cut += await chunks.truncate_chunk(inode, trim.layout, index, rest, CHUNK_TIMEOUT_NS)
        if cut:
            await chunks.flush(cut, CHUNK_TIMEOUT_NS)

    async def _forget(self, key: bytes, value: bytes) -> None:
        async def forget(txn: Transaction) -> None:
            if await txn.get(key) == value:  # else it shrank again: cut once more
                txn.clear(key)

        await self._engine.run(forget, durable=True)

    async def _live(self) -> None:
        backoff = Backoff(100 * MS, SCAN_NS)
        while True:
            chosen = sorted(self._pending)[:TRIMS_AT_ONCE]
            await asyncio.gather(*map(self._task, chosen), return_exceptions=True)
            if self._pending:
                await self._env.sleep_ns(backoff.next_ns(self._env.random))
            else:
                backoff.reset()
                await self._env.sleep_ns(SCAN_NS)
