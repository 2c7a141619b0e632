"""One open file description: reads, writes, close-to-open consistency.

Promises: a read sees all earlier writes of this client; reads and writes of this client are atomic
against each other; disjoint ranges proceed in parallel; flush (close) makes bytes and length
visible to whoever opens afterwards; fsync makes them stable; a write error is told once to every
description that was open when it happened. Order of locks: appending, a range, attributes.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from emberfs.client.chunkio import ChunkIO
from emberfs.client.chunkread import part_of
from emberfs.client.filestate import FileState
from emberfs.client.metadata import Metadata
from emberfs.client.readcache import ReadCache, ReadMemory
from emberfs.client.smallfile import SmallFile
from emberfs.fabric.region import Buffer, Slice, length_of, view_of
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import FILE_BYTES_MAX, Inode
from emberfs.proto.ids import CHUNKS_PER_FILE_MAX, MS, SECOND, InodeId, SessionId
from emberfs.proto.meta_calls import Caller
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.client.description")

# A read at the end of the file asks meta for the length when the last answer is older than this.
LENGTH_AGE_NS = 200 * MS
TAINTED_MAX = 8  # how often a read begins again in fresh memory; each costs a call's time
END_RETRY_NS = 1 * SECOND  # between tries to end a session whose close has failed
END_RETRY_MAX_NS = 30 * SECOND

_EMPTY = memoryview(b"")
_NUMBERS = itertools.count(1)


@dataclass(frozen=True, slots=True)
class FileServices:
    """What every open file description of a client works with."""

    env: Env
    chunkio: ChunkIO
    metadata: Metadata
    read_memory: ReadMemory
    tasks: TaskSet
    durable_close: bool
    before_read: Callable[[InodeId], Awaitable[None]]  # see fence.py
    is_open_at_meta: Callable[[InodeId], bool]  # before_read would return at once
    forget: Callable[["OpenFile"], None]  # called when a description has ended


class OpenFile:
    """One open file description. Made by OpenFiles; raises EmberfsError."""

    def __init__(
        self,
        services: FileServices,
        state: FileState,
        session: SessionId,
        cache: ReadCache,
        *,
        caller: Caller,
        readable: bool,
        writable: bool,
        direct: bool,
    ) -> None:
        self.number = next(_NUMBERS)  # among the open files of this process
        self.inode_id: InodeId = state.id
        self.session = session
        self.caller = caller  # who opened it
        self.readable = readable
        self.writable = writable
        self.direct = direct  # every read and write bypasses the buffers (O_DIRECT)
        self.append_offset = 0  # where the last append went
        self.is_new = False  # made by being opened
        self.closed = False
        self.over = False  # nobody uses the session any more
        self._services = services
        self._state = state
        self._cache = cache
        self._errors_seen = state.buffer.errors

    @property
    def state(self) -> FileState:
        """What is shared with the other descriptions of this file."""
        return self._state

    @property
    def ending(self) -> bool:
        """True when all is written and meta is told that the session ends."""
        return self.over or self.session in self._state.ended

    @property
    def length(self) -> int:
        """Bytes in the file, as this client sees it now."""
        return self._state.length

    @property
    def chunkio(self) -> ChunkIO:
        """What its chunks are read and written by, the same for all files of a connection."""
        return self._services.chunkio

    # ------------------------------------------------------------ reading

    def reads_plainly(self) -> bool:
        """Tell whether storage alone can answer a read, now, below the length known here."""
        state = self._state
        return (
            self.readable
            and not self.closed
            and state.small is None
            and not state.buffer
            and self.is_there()
        )

    def is_there(self) -> bool:
        """Tell whether `check_there` would return at once."""
        return self._state.gone is None and self._services.is_open_at_meta(self.inode_id)

    async def read(self, offset: int, length: int, *, direct: bool = False) -> memoryview:
        """Bytes from `offset`; short only at the end of the file, empty at or beyond it.

        The view is valid for as long as it, or a slice of it, is held.
        """
        direct = direct or self.direct
        length = await self._bound(offset, length, direct=direct)
        if length <= 0:
            return _EMPTY
        async with self._state.lock.hold(offset, offset + length, exclusive=False):
            length = min(length, self._state.length - offset)  # a truncate may have come first
            if length <= 0:
                return _EMPTY
            found = await self._from_memory(offset, length, direct=direct)
            if found is None:
                found = await self._fetch(offset, length)
            await self.check_there()
            return found

    def _from_inline(self, small: SmallFile, offset: int, length: int) -> memoryview:
        _, view = self._services.read_memory.lender.lend(length)
        small.data.read(offset, view)
        return view

    async def _fetch(self, offset: int, length: int) -> memoryview:
        """Read from storage into lent memory.

        A server that did not confirm the end of a call may still write into the memory that the
        call named, so no other server is told to fill it: the read begins again in fresh memory.
        """
        services, tries = self._services, TAINTED_MAX
        while True:
            buffer, view = services.read_memory.lender.lend(length)
            try:
                await services.chunkio.read(self.inode_id, self._state.layout, offset, buffer)
            except EmberfsError:
                tries -= 1
                if not tries or not isinstance(buffer, Slice) or not buffer.region.abandoned:
                    raise
            else:
                return view

    async def read_into(self, offset: int, sink: Buffer, *, direct: bool = False) -> int:
        """Fill the caller's buffer; returns the byte count, short at the end of the file.

        A Slice of a Region is filled without a copy on every transport.
        """
        direct = direct or self.direct
        length = await self._bound(offset, length_of(sink), direct=direct)
        if length <= 0:
            return 0
        async with self._state.lock.hold(offset, offset + length, exclusive=False):
            length = min(length, self._state.length - offset)
            if length <= 0:
                return 0
            found = await self._from_memory(offset, length, direct=direct)
            if found is not None:
                view_of(sink)[:length] = found
            else:
                part = part_of(sink, 0, length)
                await self._services.chunkio.read(self.inode_id, self._state.layout, offset, part)
            await self.check_there()
            return length

    async def check_there(self) -> None:
        """Raise STALE if the file has been collected: its chunks would read as zeros.

        Before a read, and again when it has ended: it may have waited for very long.
        """
        await self._services.before_read(self.inode_id)
        if self._state.gone is not None:
            raise EmberfsError(Code.STALE, f"the file is lost: {self._state.gone.message}")

    async def _bound(self, offset: int, length: int, *, direct: bool) -> int:
        """How much of a range the file has; asks meta when that may have changed."""
        if not self.readable:
            raise EmberfsError(Code.BAD_HANDLE, "file is not open for reading")
        if offset < 0:
            raise EmberfsError(Code.INVALID, f"offset {offset} is negative")
        state = self._state
        await self.check_there()
        await state.look(0 if direct else LENGTH_AGE_NS)
        if offset + length > state.length and length > 0:
            now_ns = self._services.env.now_ns()
            if now_ns - state.asked_ns > LENGTH_AGE_NS:
                await state.refresh()
        return min(length, state.length - offset)

    async def _from_memory(self, offset: int, length: int, *, direct: bool) -> memoryview | None:
        """The bytes if this process holds them all; else None, and storage has what it needs."""
        state, stop = self._state, offset + length
        if state.small is not None:
            return self._from_inline(state.small, offset, length)
        pending = state.buffer.pending(offset, stop)
        if pending:
            last = pending[-1]
            if len(pending) == 1 and last.start <= offset and stop <= last.stop:
                at = offset - last.start
                _, copy = self._services.read_memory.lender.lend(length)
                copy[:] = view_of(last.buffer)[at : at + length]
                return copy
            await state.buffer.drain(offset, stop)
        if direct:
            return None
        ahead = self._cache.plan(offset, length, state.length)
        if ahead is not None and not state.buffer.pending(*ahead):
            self._cache.prefetch(*ahead)
        return await self._cache.get(offset, length) if self._cache else None

    # ------------------------------------------------------------ writing

    async def write(
        self,
        offset: int,
        data: bytes | bytearray | Buffer,
        *,
        direct: bool = False,
        append: bool = False,
    ) -> int:
        """Write all of `data`, whose memory may be reused on return; returns its length.

        Buffered: the chunks follow in the background, their errors are raised later, once.
        `direct`: returns when every chain has committed. `append`: goes to the end of the file,
        `append_offset` tells where; atomic among the writers of this client.
        """
        self._check_write()
        source = data if isinstance(data, Slice) else memoryview(data).cast("B")
        if not append:
            return await self._write_at(offset, source, direct=direct)
        async with self._state.appending:
            state = self._state
            if not state.buffer and not state.unsettled:
                await state.refresh()
            self.append_offset = state.length
            return await self._write_at(state.length, source, direct=direct)

    async def _write_at(self, offset: int, source: Buffer, *, direct: bool) -> int:
        length, state = length_of(source), self._state
        stop = offset + length
        if offset < 0:
            raise EmberfsError(Code.INVALID, f"offset {offset} is negative")
        if stop > min(FILE_BYTES_MAX, CHUNKS_PER_FILE_MAX * state.layout.chunk_bytes):
            raise EmberfsError(Code.FILE_TOO_LARGE, f"a file cannot reach to {stop} bytes")
        if not length:
            return 0
        if stop > state.length:
            await state.make_room(self.session, stop)
        async with state.lock.hold(offset, stop, exclusive=True):
            small = await state.small_for(stop)
            state.invalidate(offset, stop)
            if small is not None:
                await self._write_inline(small, offset, view_of(source), direct=direct)
                return length
            if direct or self.direct:
                await state.buffer.drain(offset, stop)
                try:
                    acknowledged = await self._services.chunkio.write(
                        self.inode_id, state.layout, offset, source
                    )
                except BaseException:
                    state.torn = True
                    raise
                state.buffer.note_committed(stop, acknowledged)
                state.invalidate(offset, stop)  # what a prefetch read in between
            else:
                await state.buffer.put(offset, view_of(source))
            state.wrote(offset, stop)
        return length

    async def _write_inline(
        self, small: SmallFile, offset: int, data: memoryview, *, direct: bool
    ) -> None:
        small.data.write(offset, data, self._services.env.now_ns())
        self._state.wrote(offset, offset + len(data))
        if direct or self.direct:
            await self._state.settle(self.session, durable=True)

    async def truncate(self, length: int, caller: Caller) -> Inode:
        """ftruncate(2): waits for writes under way, drops what is buffered beyond."""
        self._check_write()
        metadata, session = self._services.metadata, self.session

        async def perform() -> Inode:
            return await metadata.setattr(
                caller,
                self.inode_id,
                length=length,
                session=session,
                written=state.written,
                truncate_version=state.truncate_version,
            )

        state = self._state
        return await state.cut(length, perform, drop=True)

    def _check_write(self) -> None:
        if not self.writable or self.closed:
            raise EmberfsError(Code.BAD_HANDLE, "file is not open for writing")
        gone = self._state.gone
        if gone is not None:
            raise EmberfsError(Code.STALE, f"the file is lost: {gone.message}")
        self._raise_late_error()

    def _raise_late_error(self, *, told: bool = True) -> None:
        """Tell this description once of background writes that were lost.

        Not `told`: flush, which the exec of a forked child causes as well, where nobody looks at
        its result; the next write, fsync or close repeats the error.
        """
        buffer = self._state.buffer
        if buffer.errors > self._errors_seen and buffer.last_error is not None:
            if told:
                self._errors_seen = buffer.errors
            lost = buffer.last_error
            raise EmberfsError(lost.code, f"an earlier write was lost: {lost.message}")

    # ------------------------------------------------------------ settling

    async def flush(self) -> None:
        """close(2): everything is at storage, meta knows length and mtime, late errors are told.

        With `durable_close` (the default of OpenFiles) it is on stable storage, too.
        """
        if not self.writable:
            return
        state = self._state
        await state.buffer.drain()
        if self._services.durable_close and state.unstable:
            await state.fsync(self.session, data_only=True)
        if state.unsettled:
            await state.settle(self.session)
        self._raise_late_error(told=False)

    async def fsync(self, data_only: bool = False) -> None:
        """All writes of this client to the file so far are on stable storage at every replica.

        `data_only` (fdatasync) leaves out times, not the length.
        """
        state = self._state
        if state.write_sessions or state.buffer:
            await state.fsync(self.session, data_only=data_only)
        self._raise_late_error()

    async def stat(self) -> Inode:
        """Attributes, with this client's own length and mtime merged."""
        return await self._state.refresh()

    async def close(self) -> None:
        """Flush and end the session (also when the flush raises). A second call does nothing."""
        if self.closed:
            return
        self.closed = True
        problem: EmberfsError | None = None
        state, wrote = self._state, False
        try:
            if self.writable:
                await state.buffer.drain()
                wrote = state.unstable
                if wrote and self._services.durable_close:
                    await state.sync_data()
        except EmberfsError as found:
            problem = found
        finally:
            self._cache.invalidate(0, 1 << 63)
            state.caches.discard(self._cache)
            # Not cut short when the caller is cancelled: the session would stay for ever.
            name = f"close inode {self.inode_id}"
            ending = self._services.tasks.spawn(self._end(wrote), name=name)
        problem = await asyncio.shield(ending) or problem
        if problem is not None and wrote:
            raise problem
        self._raise_late_error()

    async def _end(self, wrote: bool) -> EmberfsError | None:
        """End the session at meta; returns the error, as nobody may be left to raise it to."""
        problem: EmberfsError | None = None
        try:
            if wrote:
                durable = self._services.durable_close
                await self._state.settle(self.session, close=True, durable=durable)
            else:
                self._state.ended.add(self.session)
                await self._services.metadata.settle(self.inode_id, self.session, close=True)
        except EmberfsError as found:
            problem = found
        finally:
            if problem is None:
                self._services.forget(self)
            else:
                name = f"end session {self.session} of inode {self.inode_id}"
                self._services.tasks.spawn(self._end_later(problem, wrote), name=name)
        return problem

    async def _end_later(self, problem: EmberfsError, wrote: bool) -> None:
        """The close has failed, its caller has been told: the session must not stay for that.

        It would keep the file, if its name goes, for as long as this client lives. Where nobody
        answered, the length is told again; where it was refused, what lies behind the old one is
        lost. So is what was to be kept beside the inode: it might need chunks by now, and nothing
        may be written for a session that has perhaps ended.
        """
        services, backoff = self._services, Backoff(END_RETRY_NS, END_RETRY_MAX_NS)
        try:
            while wrote and self._state.small is None and problem.code == Code.TIMEOUT:
                await services.env.sleep_ns(backoff.next_ns(services.env.random))
                try:
                    return await self._state.settle(self.session, close=True)
                except EmberfsError as found:
                    problem = found
        finally:
            self._state.ended.add(self.session)
            services.forget(self)
        while problem.code != Code.NOT_FOUND:
            log.info("session %d of inode %d stays: %s", self.session, self.inode_id, problem)
            try:
                await services.metadata.settle(self.inode_id, self.session, close=True, torn=wrote)
            except EmberfsError as found:
                problem = found
            else:
                return
            await services.env.sleep_ns(backoff.next_ns(services.env.random))
