"""Write-back buffer of one file: small writes become few large chunk updates.

An extent is a run of written bytes in one chunk. It is open while it gathers; pushed, it is on its
way to storage and does not change any more. Invariants: at most one open extent per chunk; extents
of one chunk are pushed in the order of their writes, and ChunkIO keeps the order of calls per
chunk, so overlapping writes reach storage in order; an extent is forgotten only when storage has
committed it or its error is remembered.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping

from emberfs.client import metrics
from emberfs.client.chunkio import ChunkIO
from emberfs.client.chunkread import part_of
from emberfs.client.room import Room
from emberfs.client.unflushed import ChainVersions, Mark, Unflushed
from emberfs.fabric.buffers import BufferPool
from emberfs.fabric.region import Buffer, Slice, view_of
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Layout, Piece, pieces
from emberfs.proto.ids import SECOND, InodeId, KiB, MiB
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.client.writebuffer")

FILE_BYTES = 8 * MiB  # buffered and in flight, per file
CLIENT_BYTES = 64 * MiB  # the same for all files together
EXTENT_BYTES_MAX = 4 * MiB
EXTENT_BYTES_FIRST = 16 * KiB  # of a write that continues nothing
# How long buffered bytes wait for a cluster that does not answer before they are given up. Requests
# of applications end earlier, with ETIMEDOUT; what they wrote is still on its way then.
WRITE_BACK_TIMEOUT_NS = 600 * SECOND
LOST_TEXT = "data written before the storage services lost power is gone; write it again"


class WriteMemory:
    """What all write buffers of a client share: memory, its bound, and who can free some."""

    def __init__(self, limit_bytes: int = CLIENT_BYTES) -> None:
        self.room = Room(limit_bytes)
        self.pool = BufferPool(limit_bytes)
        self.buffers: dict[WriteBuffer, None] = {}  # those that hold something, in order

    def push_all(self) -> None:
        """Send everything that is buffered anywhere."""
        for buffer in list(self.buffers):
            buffer.push_all()

    def take(self, length: int) -> Buffer:
        """Memory for an extent; private memory when the pool is cut up unluckily."""
        try:
            return self.pool.take(length)
        except EmberfsError:
            return memoryview(bytearray(length))

    def give(self, buffer: Buffer) -> None:
        """Take an extent's memory back."""
        if isinstance(buffer, Slice):
            self.pool.give(buffer)


class Extent:
    """A run of dirty bytes in one chunk."""

    __slots__ = ("born_ns", "buffer", "capacity", "index", "length", "start")

    def __init__(self, index: int, start: int, buffer: Buffer, capacity: int, born_ns: int) -> None:
        self.index = index  # of the chunk
        self.start = start  # bytes in the file
        self.length = 0
        self.buffer = buffer
        self.capacity = capacity
        self.born_ns = born_ns

    @property
    def stop(self) -> int:
        """End of the dirty bytes in the file."""
        return self.start + self.length

    def joins(self, start: int, stop: int) -> bool:
        """Tell whether a write leaves no gap and begins no earlier."""
        return self.start <= start <= self.stop

    def put(self, start: int, data: memoryview) -> None:
        """Take bytes in; they must join and fit."""
        at = start - self.start
        assert 0 <= at <= self.length
        assert at + len(data) <= self.capacity
        view_of(self.buffer)[at : at + len(data)] = data
        self.length = max(self.length, at + len(data))


class WriteBuffer:
    """Dirty bytes of one file."""

    def __init__(
        self,
        env: Env,
        inode: InodeId,
        layout: Layout,
        chunkio: ChunkIO,
        memory: WriteMemory,
        tasks: TaskSet,
    ) -> None:
        self._env = env
        self._inode = inode
        self.layout = layout
        self._chunkio = chunkio
        self._memory = memory
        self._tasks = tasks
        self._room = Room(FILE_BYTES)
        self._open: dict[int, Extent] = {}  # by chunk index
        self._sending: dict[Extent, asyncio.Task[None]] = {}  # in the order of pushing
        self._last_stop = -1  # end of the last write: tells a stream
        self.committed_stop = 0  # highest end that storage has committed
        self.unflushed = Unflushed()  # commits since the last fsync
        self.errors = 0  # how many background writes were lost
        self.last_error: EmberfsError | None = None
        self.on_error: Callable[[], None] = lambda: None

    # ------------------------------------------------------------ questions

    def __bool__(self) -> bool:
        """True while anything is buffered or in flight."""
        return bool(self._open or self._sending)

    def pending(self, start: int, stop: int) -> list[Extent]:
        """Extents that overlap a range, in the order in which they must apply."""
        if not self._open and not self._sending:
            return []
        return [e for e in self._all() if e.start < stop and start < e.stop]

    def pending_stop(self) -> int:
        """Highest end of what storage has not committed yet; 0 if there is nothing."""
        return max((e.stop for e in self._all()), default=0)

    def committed_prefix(self) -> int:
        """Up to where a reader elsewhere may be told that the file has data."""
        return min((e.start for e in self._all()), default=self.committed_stop)

    def oldest_ns(self) -> int | None:
        """When the oldest open extent was begun."""
        return min((e.born_ns for e in self._open.values()), default=None)

    def _all(self) -> Iterator[Extent]:
        yield from self._sending
        yield from self._open.values()

    # ------------------------------------------------------------ writing

    async def put(self, offset: int, data: memoryview) -> None:
        """Take bytes in (copied); waits while the bounds are reached. Never raises late errors."""
        for piece in pieces(self._inode, self.layout, offset, len(data)):
            for at in range(0, piece.length, EXTENT_BYTES_MAX):
                begin = piece.start + at
                part = data[begin : begin + min(EXTENT_BYTES_MAX, piece.length - at)]
                await self._put_part(piece, offset + begin, part)
        self._last_stop = offset + len(data)

    async def _put_part(self, piece: Piece, start: int, data: memoryview) -> None:
        index, stop = piece.chunk_index, start + len(data)
        chunk_stop = (index + 1) * self.layout.chunk_bytes
        reserved = 0
        try:
            while True:  # until it fits: others may push or fill the extent while this waits
                extent = self._open.get(index)
                if extent is not None and extent.joins(start, stop):
                    if stop <= extent.start + extent.capacity:
                        break
                    capacity = min(chunk_stop - extent.start, EXTENT_BYTES_MAX)
                    if stop > extent.start + capacity:
                        self.push(index)
                        continue
                    need = capacity - extent.capacity
                else:
                    if extent is not None:
                        self.push(index)
                        extent = None
                    capacity = self._first_capacity(start, stop, chunk_stop)
                    need = capacity
                if reserved < need:
                    await self._reserve(need - reserved)
                    reserved = need
                    continue
                self._place(index, start, capacity, extent)
                reserved -= need
            extent.put(start, data)
        finally:
            if reserved:
                self._release(reserved)
        full = extent.stop == chunk_stop or extent.length == extent.capacity >= 1 * MiB
        if full or self._room.wanted or self._memory.room.wanted:
            self.push(index)

    def _first_capacity(self, start: int, stop: int, chunk_stop: int) -> int:
        """A stream will fill its chunk; a lone small write will hardly grow."""
        stream = start in (0, self._last_stop) and stop < chunk_stop
        wanted = EXTENT_BYTES_MAX if stream and start else max(stop - start, EXTENT_BYTES_FIRST)
        return min(wanted, chunk_stop - start)

    def _place(self, index: int, start: int, capacity: int, old: Extent | None) -> None:
        """Open an extent, or move the open one into larger memory."""
        buffer = self._memory.take(capacity)
        if old is None:
            self._open[index] = Extent(index, start, buffer, capacity, self._env.now_ns())
            self._memory.buffers[self] = None
            return
        view_of(buffer)[: old.length] = view_of(old.buffer)[: old.length]
        self._memory.give(old.buffer)
        old.buffer, old.capacity = buffer, capacity

    async def _reserve(self, count: int) -> None:
        if not self._room.try_take(count):
            self.push_all()
            await self._room.take(count)
        if not self._memory.room.try_take(count):
            self._memory.push_all()
            try:
                await self._memory.room.take(count)
            except BaseException:
                self._room.give(count)
                raise
        metrics.DIRTY_BYTES.inc(count)

    def _release(self, count: int) -> None:
        self._room.give(count)
        self._memory.room.give(count)
        metrics.DIRTY_BYTES.dec(count)

    # ------------------------------------------------------------ sending

    def push(self, index: int) -> None:
        """Send the open extent of a chunk in the background."""
        extent = self._open.pop(index)
        self._sending[extent] = self._tasks.spawn(
            self._send(extent), name=f"write inode {self._inode} chunk {index}"
        )

    def push_all(self) -> None:
        """Send every open extent."""
        for index in list(self._open):
            self.push(index)

    def push_older(self, born_ns: int) -> None:
        """Send open extents that were begun before a time."""
        for index, extent in list(self._open.items()):
            if extent.born_ns <= born_ns:
                self.push(index)

    async def _send(self, extent: Extent) -> None:
        data = part_of(extent.buffer, 0, extent.length)
        problem: EmberfsError | None = None
        acknowledged: ChainVersions = {}
        try:
            acknowledged = await self._chunkio.write(
                self._inode, self.layout, extent.start, data, timeout_ns=WRITE_BACK_TIMEOUT_NS
            )
        except EmberfsError as found:
            problem = found
        except BaseException as found:
            problem = EmberfsError(Code.INTERNAL, f"write was cut off: {found!r}")
            raise
        finally:
            del self._sending[extent]
            if problem is None:
                self.note_committed(extent.stop, acknowledged)
            else:
                self._remember(problem)
                self.on_error()
                log.error(
                    "inode %d: %d bytes at %d are lost: %s",
                    self._inode,
                    extent.length,
                    extent.start,
                    problem,
                )
            self._memory.give(extent.buffer)
            self._release(extent.capacity)
            if not self:
                self._memory.buffers.pop(self, None)

    def note_committed(self, stop: int, acknowledged: ChainVersions) -> None:
        """Storage has committed a range (also one that bypassed the buffer)."""
        self.committed_stop = max(self.committed_stop, stop)
        self.unflushed.note(acknowledged)

    def note_flushed(self, covered: Mapping[Mark, int], lost: ChainVersions) -> None:
        """Storage has flushed; what it had lost before that is told like a failed write."""
        if self.unflushed.flushed(covered, lost):
            self._remember(EmberfsError(Code.DISK, LOST_TEXT))
            log.error("inode %d: what was not flushed is lost: %s", self._inode, lost)

    def _remember(self, problem: EmberfsError) -> None:
        self.errors += 1
        self.last_error = problem
        metrics.WRITE_ERRORS.inc()

    async def drain(self, start: int = 0, stop: int = 1 << 63) -> None:
        """Push what overlaps a range and wait until storage has all of it (or it failed)."""
        for index, extent in list(self._open.items()):
            if extent.start < stop and start < extent.stop:
                self.push(index)
        waiting = [t for e, t in self._sending.items() if e.start < stop and start < e.stop]
        if waiting:
            await asyncio.wait(waiting)

    def cut(self, length: int) -> None:
        """Drop open bytes at and beyond a file length (truncate)."""
        for index, extent in list(self._open.items()):
            extent.length = min(extent.length, max(0, length - extent.start))
            if not extent.length:
                del self._open[index]
                self._memory.give(extent.buffer)
                self._release(extent.capacity)
        if not self:
            self._memory.buffers.pop(self, None)
