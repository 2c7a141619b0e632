"""Prefetched bytes of one open file description.

Segments are read in the background, in order, and handed out as views without a copy. A segment is
dropped when the stream has passed it, when this client writes to it, and when it is older than a
second (another client may have written since).
"""

import asyncio
import logging

from emberfs.client import metrics
from emberfs.client.chunkio import ChunkIO
from emberfs.client.lending import Lender
from emberfs.client.readahead import ReadAhead
from emberfs.proto.errors import EmberfsError
from emberfs.proto.files import Layout
from emberfs.proto.ids import SECOND, InodeId, MiB
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.client.readcache")

SEGMENT_BYTES_MAX = 1 * MiB  # cut at multiples of it in the file
KEEP_BEHIND_BYTES = 1 * MiB  # reads of one stream may come out of order
FILE_BYTES_MAX = 16 * MiB
CLIENT_BYTES_MAX = 128 * MiB
AGE_NS = 1 * SECOND


class ReadMemory:
    """What all read caches of a client share."""

    def __init__(self, limit_bytes: int = CLIENT_BYTES_MAX) -> None:
        self.limit_bytes = limit_bytes
        self.prefetched_bytes = 0
        self.lender = Lender(2 * limit_bytes)


class _Segment:
    __slots__ = ("born_ns", "done", "start", "stop", "view")

    def __init__(self, start: int, stop: int, view: memoryview, born_ns: int) -> None:
        self.start = start
        self.stop = stop
        self.view = view
        self.born_ns = born_ns
        # True when filled, False when dropped or failed.
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()


class ReadCache:
    """Prefetches for one stream and serves from what is there."""

    def __init__(
        self,
        env: Env,
        inode: InodeId,
        layout: Layout,
        chunkio: ChunkIO,
        memory: ReadMemory,
        tasks: TaskSet,
    ) -> None:
        self._env = env
        self._inode = inode
        self.layout = layout
        self._chunkio = chunkio
        self._memory = memory
        self._tasks = tasks
        self._policy = ReadAhead()
        self._segments: dict[int, _Segment] = {}  # by start
        self._bytes = 0

    def __bool__(self) -> bool:
        """True while it holds anything."""
        return bool(self._segments)

    def plan(self, offset: int, length: int, file_length: int) -> tuple[int, int] | None:
        """Note a read; returns the range that the policy wants prefetched."""
        self._drop_passed(offset)
        return self._policy.plan(offset, length, file_length)

    async def get(self, offset: int, length: int) -> memoryview | None:
        """The bytes if they are prefetched (waits for those under way); None otherwise.

        The caller holds the range locked, so no write of this client gets in between.
        """
        parts: list[memoryview] = []
        position, stop = offset, offset + length
        while position < stop:
            segment = self._find(position)
            if segment is None or not await asyncio.shield(segment.done):
                return None
            until = min(stop, segment.stop)
            parts.append(segment.view[position - segment.start : until - segment.start])
            position = until
        metrics.READ_AHEAD_HITS.inc(length)
        return parts[0] if len(parts) == 1 else self._joined(parts, length)

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to read a range, as far as memory allows."""
        while start < stop:
            until = min(stop, (start // SEGMENT_BYTES_MAX + 1) * SEGMENT_BYTES_MAX)
            if start not in self._segments and not self._begin(start, until):
                return
            start = until

    def invalidate(self, start: int, stop: int) -> None:
        """Drop what overlaps a range, also what is still being read."""
        for segment in list(self._segments.values()):
            if segment.start < stop and start < segment.stop:
                self._drop(segment)

    def drop_old(self) -> None:
        """Drop what is too old to be used."""
        limit_ns = self._env.now_ns() - AGE_NS
        for segment in list(self._segments.values()):
            if segment.born_ns < limit_ns:
                self._drop(segment)
        if not self._segments:
            self._policy.reset()

    def _joined(self, parts: list[memoryview], length: int) -> memoryview:
        _, whole = self._memory.lender.lend(length)
        at = 0
        for part in parts:
            whole[at : at + len(part)] = part
            at += len(part)
        return whole

    def _find(self, position: int) -> _Segment | None:
        for segment in self._segments.values():
            if segment.start <= position < segment.stop:
                if segment.born_ns < self._env.now_ns() - AGE_NS:
                    self._drop(segment)
                    self._policy.reset()
                    return None
                return segment
        return None

    def _begin(self, start: int, stop: int) -> bool:
        size = stop - start
        if (
            self._bytes + size > FILE_BYTES_MAX
            or self._memory.prefetched_bytes + size > self._memory.limit_bytes
        ):
            return False
        self._bytes += size
        self._memory.prefetched_bytes += size
        buffer, view = self._memory.lender.lend(size)
        segment = self._segments[start] = _Segment(start, stop, view, self._env.now_ns())

        async def fill() -> None:
            try:
                await self._chunkio.read(self._inode, self.layout, start, buffer)
            except EmberfsError as problem:  # the reader will meet it himself if it lasts
                log.debug("read-ahead of inode %d at %d: %s", self._inode, start, problem)
            else:
                metrics.READ_AHEAD_BYTES.inc(size)
                if not segment.done.done():
                    segment.done.set_result(True)
            finally:
                if not segment.done.done():
                    self._drop(segment)

        self._tasks.spawn(fill(), name=f"read-ahead inode {self._inode} at {start}")
        return True

    def _drop_passed(self, offset: int) -> None:
        for segment in list(self._segments.values()):
            if segment.stop <= offset - KEEP_BEHIND_BYTES:
                self._drop(segment)

    def _drop(self, segment: _Segment) -> None:
        if self._segments.get(segment.start) is segment:
            del self._segments[segment.start]
            size = segment.stop - segment.start
            self._bytes -= size
            self._memory.prefetched_bytes -= size
        if not segment.done.done():
            segment.done.set_result(False)
