"""What this client knows of one open inode, shared by all its open descriptions.

Length. `server_length` is what meta last said for `truncate_version`; `written_stop` is the highest
end of this client's own writes since that version; the file is as long as the greater of the two.
Meta learns our length by SETTLE, never more than what storage has committed without a gap, so that
a reader elsewhere sees true bytes or a short read. Answers of meta may arrive in any order: of one
truncate version the longest counts, of two versions the newer.

An inline file has a SmallFile, which goes for ever when the file gets chunks.
"""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from emberfs.client.chunkio import ChunkIO
from emberfs.client.metadata import Metadata
from emberfs.client.rangelock import END, RangeLock
from emberfs.client.readcache import ReadCache
from emberfs.client.smallfile import SmallFile
from emberfs.client.writebuffer import WriteBuffer
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode, Layout
from emberfs.proto.ids import InodeId, SessionId
from emberfs.proto.meta_calls import OpenAnswer
from emberfs.runtime.env import Env

SETTLE_TRIES = 4  # each means that somebody truncated the file in between


class FileState:
    """One inode that is open in this client."""

    def __init__(
        self,
        env: Env,
        chunkio: ChunkIO,
        metadata: Metadata,
        answer: OpenAnswer,
        layout: Layout,
        buffer: WriteBuffer,
    ) -> None:
        self._env = env
        self._chunkio = chunkio
        self._metadata = metadata
        inode = answer.inode
        self.id: InodeId = inode.id
        self.layout = layout
        self.buffer = buffer
        self.lock = RangeLock()
        self.appending = asyncio.Lock()
        self.attributes = asyncio.Lock()  # settlements and explicit changes of times, in order
        self.references = 0
        self.caches: set[ReadCache] = set()
        self.write_sessions: set[SessionId] = set()
        self.ended: set[SessionId] = set()  # that meta was told to end: nothing is written any more
        self.server_length = inode.length
        self.truncate_version = inode.truncate_version
        self.asked_ns = env.now_ns()  # when meta last told the length
        self.settled_ns = env.now_ns()
        self.written_stop = 0
        self.gone: EmberfsError | None = None  # meta knows the file no more: nobody would read it
        self.mtime_ns: int | None = None  # of own writes that meta does not know of
        self.torn = False  # a write has failed: bytes of it may lie behind the end
        self.sparse = False  # a write has left a hole, of which meta does not know
        self._unsettled_stop = 0  # end of own writes since the last settlement began
        self._settling_stop = 0  # end of own writes that the settlement under way is to tell
        self._durable_length = -1  # what a durable settlement has confirmed
        self._cut_length = -1  # set by our truncation, which may not be on stable storage yet
        buffer.on_error = self._on_write_error
        self.small = SmallFile(env, metadata, self, answer) if inode.inline else None

    @property
    def length(self) -> int:
        """Bytes in the file, as this client sees it."""
        return max(self.server_length, self.written_stop)

    def note(self, inode: Inode) -> None:
        """Learn from an answer of meta, however late it comes."""
        if self.small is not None:
            self.small.note(inode)
            return
        if inode.truncate_version < self.truncate_version:
            return
        self.asked_ns = self._env.now_ns()
        if inode.truncate_version == self.truncate_version:
            self.server_length = max(self.server_length, inode.length)
            return
        # Another client has cut the file. Our unsettled writes may be later than that: keep them.
        self.truncate_version = inode.truncate_version
        self.server_length = inode.length
        self._keep_unsettled(max(self._unsettled_stop, self._settling_stop))
        self._cut_length = -1
        self._durable_length = -1
        self.invalidate(0, END)

    def _keep_unsettled(self, stop: int) -> None:
        """Forget own writes that meta has heard of and has cut since."""
        self.written_stop = max(stop, self.buffer.pending_stop())
        self.buffer.committed_stop = stop

    def merged(self, inode: Inode) -> Inode:
        """The inode with this client's own length and mtime."""
        self.note(inode)
        mtime_ns = inode.mtime_ns if self.mtime_ns is None else max(inode.mtime_ns, self.mtime_ns)
        sparse = inode.sparse or self.sparse
        if (inode.length, inode.mtime_ns, inode.sparse) == (self.length, mtime_ns, sparse):
            return inode
        ctime_ns = max(inode.ctime_ns, mtime_ns) if self.mtime_ns is not None else inode.ctime_ns
        return msgspec.structs.replace(
            inode, length=self.length, mtime_ns=mtime_ns, ctime_ns=ctime_ns, sparse=sparse
        )

    def wrote(self, start: int, stop: int) -> None:
        """Note an own write of [start, stop)."""
        self.sparse |= start > self.length and self.small is None
        self.written_stop = max(self.written_stop, stop)
        self._unsettled_stop = max(self._unsettled_stop, stop)
        self.mtime_ns = self._env.wall_ns()

    def invalidate(self, start: int, stop: int) -> None:
        """Drop prefetched bytes of every description of this file."""
        for cache in self.caches:
            if cache:
                cache.invalidate(start, stop)

    async def refresh(self) -> Inode:
        """Ask meta for the attributes; returns them merged."""
        return self.merged(await self._metadata.getattr(self.id))

    def _on_write_error(self) -> None:
        """Bytes are lost: the file does not reach to where they would have been."""
        self.torn = True
        self.written_stop = max(self.buffer.committed_stop, self.buffer.pending_stop())
        self._unsettled_stop = min(self._unsettled_stop, self.written_stop)

    @property
    def written(self) -> int:
        """How long this client knows the file to be: by its writes that storage has, by its cut."""
        return max(self._cut_length, min(self.buffer.committed_stop, self.written_stop), 0)

    # ------------------------------------------------------------ settlement

    @property
    def cut_unstable(self) -> bool:
        """True while a power cut of meta may undo our truncation."""
        return self._cut_length >= 0

    @property
    def unsettled_bytes(self) -> bool:
        """True while meta does not know how long our writes have made the file."""
        if self.small is not None and self.small.data.unsettled:
            return True
        return bool(self.buffer) or self.written_stop > self.server_length

    @property
    def unsettled(self) -> bool:
        """True while meta has to hear of our length or mtime, or of a write that failed."""
        if self.small is not None and self.small.data.unsettled:
            return True
        return self.torn or self.mtime_ns is not None or self.written_stop > self.server_length

    @property
    def unstable(self) -> bool:
        """True while a power cut may take what was written here, or a cut."""
        if self.small is not None and self.small.data.unstable:
            return True
        return bool(self.buffer.unflushed) or self.unsettled or self.cut_unstable

    async def settle(
        self, session: SessionId, *, close: bool = False, durable: bool = False, want_stop: int = 0
    ) -> None:
        """Tell meta length and mtime; with `close` the session ends.

        Tells only what storage has; whoever wants all of it told drains the buffer before. All of
        an inline file is told; if it gets chunks meanwhile, they are made as safe as was asked for.
        To `want_stop` the file is about to grow.
        """
        was_small = self.small is not None
        async with self.attributes:
            if self.small is not None and await self.small.settle(
                session, close=close, durable=durable, want_stop=want_stop
            ):
                return
            if was_small:
                await (self.sync_data() if durable else self.buffer.drain())
            await self._settle(session, close=close, durable=durable, want_stop=want_stop)

    async def _settle(
        self, session: SessionId, *, close: bool, durable: bool, want_stop: int
    ) -> None:
        for _ in range(SETTLE_TRIES):
            version, stop = self.truncate_version, self._told_stop()
            # What was told before and not durably, a power cut of meta may have undone: tell again.
            told = not (durable or self._unsettled_stop or stop > self.server_length)
            length = None if told else max(stop, self._cut_length if durable else 0)
            mark, self._unsettled_stop = self._unsettled_stop, 0
            self._settling_stop = mark
            mtime_ns, self.mtime_ns = self.mtime_ns, None
            torn, self.torn = self.torn, False
            sparse, self.sparse = self.sparse, False
            if close:
                self.ended.add(session)
            try:
                answer = await self._metadata.settle(
                    self.id,
                    session,
                    length=length,
                    truncate_version=version,
                    mtime_ns=mtime_ns,
                    close=close,
                    durable=durable,
                    torn=torn,
                    want=max(0, want_stop - max(length or 0, self.server_length)),
                    sparse=sparse,
                )
            except BaseException as problem:
                self._unsettle(mark, mtime_ns)
                self.torn |= torn
                self.sparse |= sparse
                self.note_failure(problem)
                raise
            finally:
                self._settling_stop = 0
            if stop < mark:  # the rest of it is still on its way to storage
                self._unsettle(mark, None)
            self.settled_ns = self._env.now_ns()
            if durable and self.truncate_version == version:
                self._cut_length = -1
                self._durable_length = max(self._durable_length, stop, answer.length)
            if answer.truncate_version > version and length is not None:
                # An fdatasync may have told nothing, as the length was stable before that cut.
                durable |= self._durable_length >= 0
                self._unsettle(mark, None)
                self.note(answer)
                continue
            if answer.truncate_version < version:
                self._cut_was_undone(answer)
                continue
            if answer.truncate_version < self.truncate_version:  # told in time; cut since
                self._keep_unsettled(self._unsettled_stop)
            self.note(answer)
            return
        raise EmberfsError(Code.SUPERSEDED, f"inode {self.id} was cut again and again meanwhile")

    def note_failure(self, problem: BaseException) -> None:
        """A call to meta has failed; perhaps the file is gone."""
        if isinstance(problem, EmberfsError) and problem.code == Code.NOT_FOUND:
            self.gone = problem

    def _cut_was_undone(self, answer: Inode) -> None:
        """Meta had told of a cut that was not stable, and its power failed."""
        self.truncate_version = answer.truncate_version
        self.server_length = answer.length

    def _told_stop(self) -> int:
        return min(self.buffer.committed_prefix(), self.buffer.committed_stop, self.written_stop)

    def _unsettle(self, mark: int, mtime_ns: int | None) -> None:
        self._unsettled_stop = max(self._unsettled_stop, mark)
        if self.mtime_ns is None:
            self.mtime_ns = mtime_ns

    # ------------------------------------------------------------ stability

    async def flush(self, session: SessionId) -> None:
        """All bytes are committed by storage and meta knows the length."""
        await self.buffer.drain()
        if self.unsettled:
            await self.settle(session)

    async def sync_data(self) -> None:
        """All bytes written so far are on stable storage of every replica.

        Some may have been lost before, in a power cut of all: every description is told, once.
        """
        await self.buffer.drain()
        unflushed = self.buffer.unflushed
        covered = unflushed.now()
        if covered:
            lost = await self._chunkio.flush(unflushed.chains)
            self.buffer.note_flushed(covered, lost)

    async def fsync(self, session: SessionId, *, data_only: bool) -> None:
        """sync_data, then the attributes, or with `data_only` only the length."""
        if self.small is not None:
            if self.small.data.unstable or not data_only:
                await self.settle(session, durable=True)
            return
        await self.sync_data()
        if data_only and self._durable_length == self.length:
            return
        await self.settle(session, durable=True)

    # ------------------------------------------------------------ truncation

    async def cut(
        self, length: int, perform: Callable[[], Awaitable[Inode]], *, drop: bool
    ) -> Inode:
        """Change the length by `perform`, in order with all reads and writes of this client.

        With `drop` buffered bytes beyond are not even sent: only where it cannot be refused.
        """
        async with self.lock.hold(0, END, exclusive=True):
            if drop:
                self.buffer.cut(length)
            was_small = self.small is not None
            await self._drain_for_cut()
            async with self.attributes:
                if was_small and self.small is None:  # it has got chunks meanwhile
                    await self.buffer.drain()
                    await self._tell_before_cut(self._settle)
                inode = await perform()
                await self._was_cut(inode)
        return self.merged(inode)

    async def _drain_for_cut(self) -> None:
        """Under the exclusive lock: no byte is on its way, and meta knows how long the file was.

        Meta cuts where the file shrinks from a length that it knows of; and what lies behind that
        length when the file grows, because some writer that has died may have left it there. So
        it must have heard of every write, also of one below the length that we believe in: another
        client may have cut the file before it, and meta would take its bytes for left behind.
        """
        await self.buffer.drain()
        if self.small is None:
            await self._tell_before_cut(self.settle)

    async def _tell_before_cut(self, settle: Callable[..., Awaitable[None]]) -> None:
        """Tell meta of writes that it has not heard of, also below the length known here.

        Another client may have cut the file before them; the answer says so.
        """
        stop = self.buffer.committed_stop
        if self._untold(stop) and self.write_sessions:
            self.written_stop = max(self.written_stop, stop)
            session = next(iter(self.write_sessions))
            await settle(session, close=False, durable=False, want_stop=0)

    def _untold(self, stop: int) -> bool:
        """Tell whether meta may not know of own writes that storage has up to `stop`."""
        return stop > self.server_length or (stop > 0 and self._unsettled_stop > 0)

    async def make_room(self, session: SessionId, stop: int) -> None:
        """Before a write lets the file grow to `stop`: raise QUOTA if a quota does not allow it."""
        rooms, now_ns = self._metadata.rooms, self._env.now_ns()
        room = rooms.of(self.id)
        if room is None or room.allows(stop, now_ns):
            return
        await self.buffer.drain()
        await self.settle(session, want_stop=stop)
        room = rooms.of(self.id)
        if room is not None and stop > room.stop:
            raise EmberfsError(
                Code.QUOTA, f"inode {self.id} cannot grow to {stop} bytes: its quota is used up"
            )

    async def _was_cut(self, inode: Inode) -> None:
        """Under the exclusive lock: meta has set the length."""
        if self.small is not None:
            self.mtime_ns = None
            await self.small.was_cut(inode)
            return
        if inode.truncate_version >= self.truncate_version:
            self.truncate_version = inode.truncate_version
            self.server_length = inode.length
        self.written_stop = self._unsettled_stop = 0
        self.buffer.committed_stop = 0
        self._durable_length = -1
        self._cut_length = inode.length
        self.mtime_ns = None
        self.invalidate(0, END)

    # ------------------------------------------------------------ inline files

    def opened(self, answer: OpenAnswer) -> Inode:
        """The file was opened; returns its inode, merged."""
        if self.small is not None:
            self.small.opened(answer)
        return self.merged(answer.inode)

    async def small_for(self, stop: int) -> SmallFile | None:
        """What a write that ends at `stop` goes to, under its lock; None: the file has chunks."""
        while self.small is not None and not self.small.data.takes(stop):
            async with self.attributes:
                if self.small is not None and not self.small.data.takes(stop):
                    await self.small.promote()
        return self.small

    async def look(self, age_ns: int) -> None:
        """Before a read: an inline file is what meta has, as far as was asked `age_ns` ago."""
        if self.small is not None and self._env.now_ns() - self.asked_ns > age_ns:
            await self.refresh()
        if self.small is not None:  # it may have got chunks while meta was asked
            await self.small.look()

    def dirty_since(self, when_ns: int) -> bool:
        """Tell whether own writes to an inline file have not been told since then."""
        small = self.small
        return small is not None and bool(small.data.dirty) and small.data.dirty_ns <= when_ns

    def no_writers(self) -> None:
        """The last description that can settle has gone: what it could not tell is lost."""
        if self.small is not None and self.small.data.unstable:
            self.small.data.lose()
            self.written_stop = 0

    async def leave_inline(self, inode: Inode, writes: list[tuple[int, memoryview]]) -> None:
        """The file has chunks now; these own writes they do not have. Reads go on as before."""
        assert inode.layout is not None
        self.layout = self.buffer.layout = inode.layout
        for cache in self.caches:
            cache.layout = inode.layout
        self.truncate_version, self.server_length = inode.truncate_version, inode.length
        stop, reach = 0, inode.length
        for start, data in writes:
            self.sparse |= start > reach
            stop = start + len(data)
            reach = max(reach, stop)
        self.written_stop = self._unsettled_stop = stop
        for start, data in writes:
            await self.buffer.put(start, data)
        self.small = None
