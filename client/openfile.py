"""Open files: what FUSE and the path API read and write.

The table of open files of one client, and the clock that pushes what lies too long."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from emberfs.client import metrics
from emberfs.client.chunkio import ChunkIO
from emberfs.client.description import FileServices, OpenFile
from emberfs.client.fence import Fence, Membership
from emberfs.client.filestate import FileState
from emberfs.client.metadata import NO_SESSION, Metadata
from emberfs.client.nodecalls import RoutingView
from emberfs.client.readcache import ReadCache, ReadMemory
from emberfs.client.writebuffer import WriteBuffer, WriteMemory
from emberfs.proto.cluster import RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import MS, SECOND, InodeId, SessionId
from emberfs.proto.meta_calls import Caller, OpenAnswer
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet

__all__ = ["OpenFile", "OpenFiles"]

T = TypeVar("T")

log = logging.getLogger("emberfs.client.openfile")

TICK_NS = 250 * MS
DIRTY_AGE_NS = 1 * SECOND  # buffered bytes are sent after this
CLOSE_NS = 30 * SECOND  # how long the end of the client waits for servers that do not answer
LATE_NS = 10 * SECOND  # after which no held-up copy of a call is expected any more
ABANDON_RETRY_NS = 1 * SECOND
HINT_AGE_NS = 5 * SECOND  # meta hears of a growing length after this

# Refused before a session is recorded. Anything else may come afterwards: of a cut that the open
# had to wait for, or of nobody.
_REFUSALS = frozenset(
    {
        Code.NOT_FOUND,
        Code.EXISTS,
        Code.NOT_DIRECTORY,
        Code.IS_DIRECTORY,
        Code.NOT_PERMITTED,
        Code.ACCESS,
        Code.NAME_TOO_LONG,
        Code.LOOP,
        Code.INVALID,
        Code.UNSUPPORTED,
        Code.QUOTA,
    }
)


class OpenFiles:
    """All open files of one client process, with one FileState per inode."""

    def __init__(
        self,
        env: Env,
        chunkio: ChunkIO,
        metadata: Metadata,
        *,
        durable_close: bool = True,
        membership: Membership | None = None,
        routing: RoutingView | None = None,
    ) -> None:
        """`durable_close`: closing a written file makes it stable (DESIGN section 5).

        With `membership` and `routing` sessions that meta may have lost are renewed (fence.py).
        """
        self.env = env
        self.chunkio = chunkio
        self.metadata = metadata
        self.read_memory = ReadMemory()
        self.write_memory = WriteMemory()
        self._states: dict[InodeId, FileState] = {}
        self._descriptions: dict[InodeId, set[OpenFile]] = {}
        self._returned: set[SessionId] = set()  # opened anew while their ends were under way
        self._tasks = TaskSet()
        self._fence = Fence(membership, self._reopen)
        if membership is not None:
            chunkio.guard(self._fence.before_write)
        if routing is not None:
            self._fence.note_routing(routing.snapshot)
            routing.subscribe(self._on_routing)
        self._services = FileServices(
            env,
            chunkio,
            metadata,
            self.read_memory,
            self._tasks,
            durable_close,
            self._fence.before_read,
            self._fence.is_current,
            self._forget,
        )
        self._ticking = False

    # ------------------------------------------------------------ opening

    async def open(
        self,
        caller: Caller,
        inode: InodeId,
        *,
        read: bool = True,
        write: bool = False,
        truncate: bool = False,
        direct: bool = False,
    ) -> tuple[Inode, OpenFile]:
        """Open by inode; the answer has this client's own length merged. ACCESS, NOT_FOUND..."""
        session = self.metadata.new_session()
        answers: list[OpenAnswer] = []

        async def perform() -> Inode:
            answer = await self.metadata.open(
                caller, inode, session, read=read, write=write, truncate=truncate
            )
            answers.append(answer)
            return answer.inode

        state = self._states.get(inode)
        try:
            if truncate and state is not None:
                await state.cut(0, perform, drop=False)
            else:
                await perform()
        except BaseException as problem:
            self._abandon(session, problem, inode)
            raise
        return self._opened(caller, answers[-1], session, read=read, write=write, direct=direct)

    async def create(
        self,
        caller: Caller,
        parent: InodeId,
        name: bytes,
        mode: int,
        *,
        read: bool = True,
        write: bool = True,
        exclusive: bool = False,
        truncate: bool = False,
        direct: bool = False,
        umask: int = 0,
    ) -> tuple[Inode, OpenFile]:
        """Create and open, or open what exists (EXISTS if `exclusive`).

        The umask counts where the directory has no default ACL.
        """
        session = self.metadata.new_session()
        answers: list[OpenAnswer] = []

        async def perform() -> Inode:
            answer = await self.metadata.create(
                caller,
                parent,
                name,
                mode,
                session=session,
                read=read,
                write=write,
                exclusive=exclusive,
                truncate=truncate,
                umask=umask,
            )
            answers.append(answer)
            return answer.inode

        state = await self._written_here(caller, parent, name) if truncate else None
        try:
            await (perform() if state is None else state.cut(0, perform, drop=False))
        except BaseException as problem:

            async def find() -> InodeId:
                return (await self.metadata.lookup(caller, parent, name)).id

            self._abandon(session, problem, find)
            raise
        return self._opened(caller, answers[-1], session, read=read, write=write, direct=direct)

    async def _written_here(self, caller: Caller, parent: InodeId, name: bytes) -> FileState | None:
        """The state of a file that is open here for writing: cutting it must wait its turn."""
        if not any(state.write_sessions for state in self._states.values()):
            return None
        try:
            found = await self.metadata.lookup(caller, parent, name)
        except EmberfsError:
            return None
        return self._states.get(found.id)

    def _opened(
        self,
        caller: Caller,
        answer: OpenAnswer,
        session: SessionId,
        *,
        read: bool,
        write: bool,
        direct: bool,
    ) -> tuple[Inode, OpenFile]:
        number = answer.inode.id
        state = self._states.get(number)
        if state is None:
            state = self._states[number] = self._new_state(answer)
        inode = state.opened(answer)
        cache = ReadCache(
            self.env, inode.id, state.layout, self.chunkio, self.read_memory, self._tasks
        )
        file = OpenFile(
            self._services,
            state,
            session,
            cache,
            caller=caller,
            readable=read,
            writable=write,
            direct=direct,
        )
        file.is_new = answer.is_new
        self._fence.watch(inode.id)
        state.references += 1
        state.caches.add(cache)
        if write:
            state.write_sessions.add(session)
        self._descriptions.setdefault(number, set()).add(file)
        metrics.OPEN_FILES.inc()
        self._start_ticking()
        return inode, file

    def _new_state(self, answer: OpenAnswer) -> FileState:
        inode = answer.inode
        if inode.layout is None:
            raise EmberfsError(Code.INVALID, f"inode {inode.id} is not a regular file")
        buffer = WriteBuffer(
            self.env, inode.id, inode.layout, self.chunkio, self.write_memory, self._tasks
        )
        return FileState(self.env, self.chunkio, self.metadata, answer, inode.layout, buffer)

    def _abandon(
        self,
        session: SessionId,
        problem: BaseException,
        inode: InodeId | Callable[[], Awaitable[InodeId]],
    ) -> None:
        """An open that may have succeeded, for all that is known, must not leave a session behind.

        `inode` may have to be looked up: that of a file which a lost answer would have named.
        """
        if isinstance(problem, EmberfsError) and problem.code in _REFUSALS:
            return

        async def end() -> None:
            for pause_ns in (0, LATE_NS):
                await self.env.sleep_ns(pause_ns)
                while not await self._end_session(session, inode):
                    await self.env.sleep_ns(ABANDON_RETRY_NS)

        self._spawn(end(), f"abandon session {session}")

    async def _end_session(
        self, session: SessionId, inode: InodeId | Callable[[], Awaitable[InodeId]]
    ) -> bool:
        """Tell whether meta has answered; then the session is not there any more."""
        try:
            number = await inode() if callable(inode) else inode
            await self.metadata.settle(number, session, close=True)
        except EmberfsError as problem:
            log.info("an open was given up; its session: %s", problem)
            return problem.code != Code.TIMEOUT
        return True

    def find(self, inode: InodeId, *, read: bool, write: bool) -> OpenFile | None:
        """An open description of a file with these rights at least, if there is one."""
        for file in self._descriptions.get(inode, ()):
            if file.readable >= read and file.writable >= write and not file.closed:
                return file
        return None

    def _forget(self, file: OpenFile) -> None:
        state = file.state
        descriptions = self._descriptions[file.inode_id]
        descriptions.discard(file)
        if not descriptions:
            del self._descriptions[file.inode_id]
        metrics.OPEN_FILES.dec()
        state.write_sessions.discard(file.session)
        file.over = True
        if file.session in self._returned:
            self._returned.discard(file.session)
            self._end_again(file)
        state.ended.discard(file.session)
        if not state.write_sessions:
            state.no_writers()
        state.references -= 1
        if not state.references and self._states.get(state.id) is state:
            del self._states[state.id]
            self._fence.forget(state.id)
            self.metadata.rooms.forget(state.id)

    def _on_routing(self, snapshot: RoutingSnapshot) -> None:
        if self._fence.note_routing(snapshot) and self._states:
            self._spawn(self._renew_sessions(), "renew sessions")

    async def _renew_sessions(self) -> None:
        """Soon, not only at the next use: a file that loses its name meanwhile must stay."""
        for inode in list(self._states):
            try:
                await self._fence.before_read(inode)
            except EmberfsError as problem:
                log.warning("session on inode %d is not renewed: %s", inode, problem)

    async def _reopen(self, inode: InodeId) -> None:
        """Give a file its sessions back, which meta may have ended. STALE if it is gone."""
        for file in sorted(
            (file for file in self._descriptions.get(inode, ()) if not file.ending),
            key=lambda file: file.session,
        ):  # those that are being closed, too: they still send what is buffered
            try:
                answer = await self.metadata.open(
                    file.caller, inode, file.session, read=file.readable, write=file.writable
                )
                if file.state.small is not None:
                    file.state.small.reopened(answer)
            except EmberfsError as problem:
                if problem.code != Code.NOT_FOUND:
                    raise
                file.state.gone = problem
                raise EmberfsError(
                    Code.STALE, f"the file went while this client was away: {problem.message}"
                ) from problem
            finally:
                if file.ending:
                    self._end_again(file)

    def _end_again(self, file: OpenFile) -> None:
        """A session that came back while its file was being closed must not outlive it.

        Nor end before what the close tells has arrived: meta would take the bytes behind the known
        end for nobody's, or collect a file without a name, and the close would not find it.
        """
        if file.over:
            self._abandon(file.session, EmberfsError(Code.TIMEOUT), file.inode_id)
        else:
            self._returned.add(file.session)

    def _spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        return self._tasks.spawn(work, name=name)

    # ------------------------------------------------------------ attributes

    def merged(self, inode: Inode) -> Inode:
        """The inode with length and mtime of this client's own writes, if it is open here.

        For every inode that goes to an application: lookup, getattr, readdirplus.
        """
        state = self._states.get(inode.id)
        return inode if state is None else state.merged(inode)

    async def stored_bytes(self, inode: Inode) -> int:
        """What a file takes, which is less than its length where it has holes: st_blocks.

        Storage is asked only about files that may have some. While bytes are on their way there, or
        if it does not answer, the length must do: too much is harmless, but some programs take a
        file that is told to hold nothing for one that reads as zeros.
        """
        state = self._states.get(inode.id)
        if not inode.sparse or inode.layout is None or (state is not None and state.buffer):
            return inode.length
        try:
            if inode.inline:
                found = await self._inline_bytes(inode.id, state)
            else:
                found = await self.chunkio.stored_bytes(inode.id, inode.layout)
        except EmberfsError as problem:
            log.info("what inode %d takes is not known: %s", inode.id, problem)
            found = None
        return inode.length if found is None else min(found, inode.length)

    async def _inline_bytes(self, inode: InodeId, state: FileState | None) -> int | None:
        """The content of an inline file, without the zeros behind it; storage has nothing of it."""
        small = state.small if state is not None else None
        if small is not None and not small.data.outdated:
            return len(small.data.content)
        answer = await self.metadata.content(inode)
        return None if answer.content is None else len(answer.content)

    async def truncate(self, caller: Caller, inode: InodeId, length: int) -> Inode:
        """truncate(2) by inode, in order with this client's own writes."""
        return await self.setattr(caller, inode, length=length)

    async def setattr(
        self,
        caller: Caller,
        inode: InodeId,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        length: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        session: SessionId = NO_SESSION,
    ) -> Inode:
        """Change attributes, in order with this client's own writes; the answer is merged."""

        async def perform() -> Inode:
            return await self.metadata.setattr(
                caller,
                inode,
                mode=mode,
                uid=uid,
                gid=gid,
                length=length,
                atime_ns=atime_ns,
                mtime_ns=mtime_ns,
                session=session,
                written=state.written if state is not None and length is not None else 0,
                truncate_version=state.truncate_version if state is not None else 0,
            )

        state = self._states.get(inode)
        if state is None:
            return await perform()
        if length is not None:
            return await state.cut(length, perform, drop=session != NO_SESSION)
        if mtime_ns is None:
            return state.merged(await perform())
        async with state.attributes:
            found = await perform()
            # What was set counts, not when the bytes before it were written or settle.
            state.mtime_ns = found.mtime_ns if state.unsettled_bytes else None
        return state.merged(found)

    # ------------------------------------------------------------ time

    def _start_ticking(self) -> None:
        if not self._ticking:
            self._ticking = True
            self._spawn(self._tick(), "open files")

    async def _tick(self) -> None:
        """Push old bytes, drop old prefetched ones, tell meta of growing lengths."""
        try:
            while self._states:
                await self.env.sleep_ns(TICK_NS)
                now_ns = self.env.now_ns()
                for buffer in list(self.write_memory.buffers):
                    buffer.push_older(now_ns - DIRTY_AGE_NS)
                for state in list(self._states.values()):
                    for cache in state.caches:
                        cache.drop_old()
                    age_ns = now_ns - state.settled_ns
                    if (state.unsettled and age_ns > HINT_AGE_NS) or (
                        state.dirty_since(now_ns - DIRTY_AGE_NS) and age_ns > DIRTY_AGE_NS
                    ):
                        self._hint(state, now_ns)
        finally:
            self._ticking = False

    def _hint(self, state: FileState, now_ns: int) -> None:
        session = next(iter(state.write_sessions), None)
        if session is None or state.attributes.locked():  # somebody is telling it
            return
        state.settled_ns = now_ns

        async def tell() -> None:
            try:
                await state.settle(session)
            except EmberfsError as problem:
                log.info("length of inode %d not settled yet: %s", state.id, problem)

        self._spawn(tell(), f"settle inode {state.id}")

    async def flush_all(self) -> None:
        """syncfs(2), first half: all bytes are at storage and meta knows every length."""
        for state in list(self._states.values()):
            session = next(iter(state.write_sessions), None)
            if session is not None:
                await state.flush(session)

    async def close(self) -> None:
        """Push what is buffered and end every session; errors are logged, nobody is left."""

        async def end(file: OpenFile) -> None:
            try:
                await file.close()
            except EmberfsError as problem:
                log.error("closing inode %d: %s", file.inode_id, problem)

        try:
            async with asyncio.timeout(CLOSE_NS / SECOND):
                every = [file for files in self._descriptions.values() for file in files]
                await asyncio.gather(*map(end, every))
        except TimeoutError:
            left = sum(map(len, self._descriptions.values()))
            log.error("%d files could not be closed in time", left)
        await self._tasks.close()
        self.write_memory.pool.close()
        self.read_memory.lender.close()
