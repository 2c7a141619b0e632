"""Cutting the chunks of files that shrank.

Crash windows: the new length and the trim record are one transaction; chunks are cut only when it
is on stable storage; the record goes last, when the cut is stable, and for good, before anybody is
answered: a power cut that brought it back would repeat the cut on what was written since. Whenever
the server dies before, the trim is found again at the next start and repeated.

Of several servers only the owner that the record names cuts (tenure.py); the others wait for it,
and take the record over when its tenure is over.

While a trim is pending, whoever would open the file, extend it or settle a length waits for it:
otherwise the cut could take data that was written after the file shrank. They look for the record
in their own transactions (load_uncut).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

from msgspec.structs import replace

from emberfs.client.unflushed import ChainVersions, Unflushed
from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.meta import schema
from emberfs.meta.metrics import TRIMS_PENDING
from emberfs.meta.schema import Owner
from emberfs.meta.tenure import Tenure
from emberfs.meta.tree import read_inode
from emberfs.proto.errors import Code, EmberfsError
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
WAIT_NS = 8 * SECOND  # for a trim of another server
WAIT_FIRST_NS = 10 * MS
WAIT_MAX_NS = 250 * MS

T = TypeVar("T")


class Chunks(Protocol):
    """The part of client.chunkio.ChunkIO that metadata needs."""

    async def remove_chunks(
        self, inode: InodeId, layout: Layout, first_index: int, timeout_ns: int
    ) -> ChainVersions:
        """Remove every chunk of the file from `first_index` on; names the chains to flush."""
        ...

    async def write(
        self,
        inode: InodeId,
        layout: Layout,
        offset: int,
        data: memoryview,
        *,
        timeout_ns: int,
    ) -> ChainVersions:
        """Write at `offset`; on return every chain has committed; names the chains to flush."""
        ...

    async def truncate_chunk(
        self, inode: InodeId, layout: Layout, index: int, length: int, timeout_ns: int
    ) -> ChainVersions:
        """Cut a chunk to `length` bytes; names the chains to flush."""
        ...

    async def flush(self, chains: Iterable[ChainId], timeout_ns: int) -> ChainVersions:
        """Make what was done on these chains stable, unless it is lost: see `make_stable`."""
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


async def make_stable(chunks: Chunks, timeout_ns: int, *done: ChainVersions) -> bool:
    """Flush what was done; False if a power cut may have undone it before: do it again."""
    unflushed = Unflushed(*done)
    if not unflushed:
        return True
    lost = await chunks.flush(unflushed.chains, timeout_ns)
    return not unflushed.flushed(unflushed.now(), lost)


class TrimError(Exception):
    """A transaction finds that the file is still to be cut."""

    def __init__(self, inode: InodeId) -> None:
        super().__init__(f"inode {inode} is to be cut")
        self.inode = inode


async def load_uncut(txn: Transaction, inode: InodeId) -> Inode:
    """Return an inode or raise NOT_FOUND; TrimError while a trim is pending: see Trims.after."""
    value, trim = await txn.get_many((keys.inode_key(inode), keys.trim_key(inode)))
    if trim is not None:
        raise TrimError(inode)
    return read_inode(inode, value)


async def cut_behind(txn: Transaction, inode: Inode, length: int, tenure: Tenure) -> None:
    """Record that the file's chunks are to be cut at `length`; a caller that shrinks stores it."""
    assert inode.layout is not None
    key = keys.trim_key(inode.id)
    value, owner = await txn.get(key), tenure.owner()
    if value is not None:  # an earlier trim is still pending: one cut at the lower end does both
        pending = schema.TRIM.decode(value)
        length = min(length, pending.length)
        owner = pending.owner or owner
    txn.set(key, schema.TRIM.encode(schema.Trim(length, inode.layout, owner)))


class Trims:
    """Performs trims, one at a time per file."""

    def __init__(
        self, env: Env, engine: Engine, tenure: Tenure, chunks_of: Callable[[Owner], Chunks]
    ) -> None:
        """`chunks_of`: how an owner cuts, see chunkguard.py."""
        self._env = env
        self._engine = engine
        self._tenure = tenure
        self._chunks_of = chunks_of
        self._pending: set[InodeId] = set()
        self._running: dict[InodeId, asyncio.Task[EmberfsError | None]] = {}
        self._tasks = TaskSet()

    async def load(self) -> None:
        """Find the trims that are unfinished: those of earlier lives among them."""
        found: set[InodeId] = set()
        start, stop = keys.span_of(keys.Prefix.TRIM.value)
        while start < stop:
            rows = await self._rows(start, stop)
            for key, value in rows:
                inode, owner = InodeId(keys.unpack_inode_suffix(key)), _owner_of(value)
                left = self._tenure.is_over(owner) and self._tenure.is_mine(inode)
                ours = left or self._tenure.holds(owner)
                found |= {inode} if ours else set()
            start = rows[-1][0] + b"\0" if len(rows) == SCAN_ROWS else stop
        self._pending |= found
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

    async def after(self, work: Callable[[], Awaitable[T]]) -> T:
        """Perform `work`, again after every trim that hinders it."""
        while True:
            try:
                return await work()
            except TrimError as found:
                await self.finish(found.inode)

    async def finish(self, inode: InodeId) -> None:
        """Return when no trim of this file is pending; raises what stopped it.

        BUSY when another server is at it for long.
        """
        backoff = Backoff(WAIT_FIRST_NS, WAIT_MAX_NS)
        until_ns = self._env.now_ns() + WAIT_NS
        while (value := await self._value(keys.trim_key(inode))) is not None:
            owner = _owner_of(value)
            if self._tenure.holds(owner):
                await self._cut_here(inode)
            elif self._tenure.is_over(owner):
                await self._take_over(inode, value)
            elif self._env.now_ns() >= until_ns:
                raise EmberfsError(Code.BUSY, f"another server is truncating inode {inode}")
            else:
                await self._env.sleep_ns(backoff.next_ns(self._env.random))

    async def _cut_here(self, inode: InodeId) -> None:
        # Not cancelled with the caller: a cut that is on its way must not be overtaken.
        problem = await asyncio.shield(self._task(inode))
        if problem is not None:
            raise EmberfsError(problem.code, f"truncating inode {inode}: {problem.message}")

    async def _take_over(self, inode: InodeId, value: bytes) -> None:
        """Become the owner of a trim whose owner's tenure is over, if nobody was faster."""
        key, owner = keys.trim_key(inode), self._tenure.owner()

        async def take(txn: Transaction) -> None:
            if await txn.get(key) == value:
                trim = replace(schema.TRIM.decode(value), owner=owner)
                txn.set(key, schema.TRIM.encode(trim))

        await self._engine.run(take)
        log.info("took over the trim of inode %d", inode)

    async def perform(self, inode: InodeId) -> None:
        """Perform the trim that a transaction may just have recorded for this file."""
        await self.finish(inode)

    async def settled(self, inode: InodeId) -> None:
        """Wait for a cut that is under way here, whatever comes of it."""
        running = self._running.get(inode)
        if running is not None:
            await asyncio.shield(running)

    def _task(self, inode: InodeId) -> asyncio.Task[EmberfsError | None]:
        task = self._running.get(inode)
        if task is None or task.done():
            self._pending.add(inode)
            TRIMS_PENDING.set(len(self._pending))
            task = self._tasks.spawn(self._cut(inode), name=f"trim {inode}")
            self._running[inode] = task
        return task

    async def _cut(self, inode: InodeId) -> EmberfsError | None:
        """Cut until no record of ours is left; returns what went wrong (it then stays)."""
        key = keys.trim_key(inode)
        try:
            await self._engine.sync()
            while (value := await self._value(key)) is not None:
                trim = schema.TRIM.decode(value)
                if trim.owner is None or not self._tenure.holds(trim.owner):
                    break
                await self._cut_chunks(inode, trim, self._chunks_of(trim.owner))
                await self._forget(key, value)
        except EmberfsError as problem:
            log.warning("trim of inode %d waits: %s", inode, problem)
            return _told(problem)
        self._pending.discard(inode)
        self._running.pop(inode, None)
        TRIMS_PENDING.set(len(self._pending))
        return None

    async def _value(self, key: bytes) -> bytes | None:
        async def read(txn: Transaction) -> bytes | None:
            return await txn.get(key)

        return await self._engine.run(read, read_only=True)

    async def _cut_chunks(self, inode: InodeId, trim: schema.Trim, chunks: Chunks) -> None:
        index, rest = divmod(trim.length, trim.layout.chunk_bytes)
        first = index + 1 if rest else index
        while True:
            done = [await chunks.remove_chunks(inode, trim.layout, first, CHUNK_TIMEOUT_NS)]
            if rest:
                done.append(
                    await chunks.truncate_chunk(inode, trim.layout, index, rest, CHUNK_TIMEOUT_NS)
                )
            if await make_stable(chunks, CHUNK_TIMEOUT_NS, *done):
                return

    async def _forget(self, key: bytes, value: bytes) -> None:
        async def forget(txn: Transaction) -> None:
            if await txn.get(key) == value:  # else it shrank again: cut once more
                txn.clear(key)

        await self._engine.run(forget, durable=True)

    async def _live(self) -> None:
        backoff = Backoff(100 * MS, SCAN_NS)
        while True:
            chosen = sorted(self._pending)[:TRIMS_AT_ONCE]
            await asyncio.gather(*map(self._finish_quietly, chosen))
            if self._pending:
                await self._env.sleep_ns(backoff.next_ns(self._env.random))
                continue
            backoff.reset()
            await self._env.sleep_ns(SCAN_NS)
            try:
                await self.load()
            except EmberfsError as problem:
                log.warning("looking for trims: %s", problem)

    async def _finish_quietly(self, inode: InodeId) -> None:
        try:
            await self.finish(inode)
        except EmberfsError as problem:
            log.info("the trim of inode %d waits: %s", inode, problem)
        else:
            self._pending.discard(inode)
            TRIMS_PENDING.set(len(self._pending))


def _owner_of(value: bytes) -> Owner | None:
    return schema.TRIM.decode(value).owner


def _told(problem: EmberfsError) -> EmberfsError:
    """What a caller is to hear: another server may do what this one must not do any more."""
    code = Code.NOT_REGISTERED if problem.code == Code.CANCELLED else problem.code
    return EmberfsError(code, problem.message)
