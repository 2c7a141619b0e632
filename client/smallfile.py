"""An inline file that is open in this client: reads and writes in memory, settled as a whole.

Several writers: a settlement names the version of the content that it was made from. If meta has
another one, that is fetched, the own writes are laid over it, and the settlement is tried again; so
nobody's bytes are undone. A file that grows over the limit gets chunks (meta/promote.py), as does
one that is fought for; from then on it is like any other.

Whatever changes the version of the content here, and whoever leaves, holds `state.attributes`.
"""

import asyncio
from typing import Protocol

from emberfs.client.inline import InlineContent
from emberfs.client.metadata import Metadata
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import InodeId, SessionId
from emberfs.proto.meta_calls import OpenAnswer
from emberfs.runtime.env import Env

SETTLE_TRIES = 8  # each means that somebody else has settled in between


class State(Protocol):
    """The part of filestate.FileState that is used here."""

    id: InodeId
    attributes: asyncio.Lock
    small: "SmallFile | None"
    asked_ns: int
    settled_ns: int
    truncate_version: int
    server_length: int
    written_stop: int
    ended: set[SessionId]
    mtime_ns: int | None

    @property
    def length(self) -> int:
        """Bytes in the file."""
        ...

    def note_failure(self, problem: BaseException) -> None:
        """A call to meta has failed; perhaps the file is gone."""
        ...

    async def leave_inline(self, inode: Inode, writes: list[tuple[int, memoryview]]) -> None:
        """The file has chunks now; these own writes they do not have."""
        ...


class SmallFile:
    """The inline half of a FileState, which has it as long as the file is inline."""

    def __init__(self, env: Env, metadata: Metadata, state: State, answer: OpenAnswer) -> None:
        self._env = env
        self._metadata = metadata
        self._state = state
        content = answer.content or b""
        self.data = InlineContent(answer.inode.inline_version, content, answer.inline_bytes_max)
        self.data.stale = answer.content is None

    # ------------------------------------------------------------ what meta says

    def note(self, inode: Inode) -> None:
        """Learn from an answer of meta, however late it comes."""
        data, state = self.data, self._state
        if inode.inline and inode.inline_version < data.newest:
            return
        state.asked_ns = self._env.now_ns()
        data.newest = max(data.newest, inode.inline_version)
        data.promoted = data.promoted or not inode.inline
        self._measure(inode)

    def _measure(self, inode: Inode) -> None:
        state = self._state
        state.truncate_version = max(state.truncate_version, inode.truncate_version)
        state.server_length = inode.length
        state.written_stop = self.data.unsettled_stop

    def opened(self, answer: OpenAnswer) -> None:
        """The file was opened once more: the answer carries the content."""
        data, inode = self.data, answer.inode
        data.limit = answer.inline_bytes_max
        self.note(inode)
        known = answer.content is not None and inode.inline_version == data.newest
        if known and data.outdated and not data.promoted and not self._state.attributes.locked():
            data.adopt(inode.inline_version, answer.content or b"")
            self._measure(inode)

    def reopened(self, answer: OpenAnswer) -> None:
        """Meta has a new life: a power cut may have taken what was read of its former one."""
        data, inode = self.data, answer.inode
        if inode.inline and inode.inline_version < data.version and not data.unstable:
            data.stale = True

    async def look(self) -> None:
        """Return when the content is what meta was last seen to have; it may be in chunks then."""
        state = self._state
        while state.small is self and self.data.outdated:
            async with state.attributes:
                if state.small is self and self.data.outdated:
                    await self._catch_up()

    async def _catch_up(self) -> None:
        """Fetch the content."""
        data = self.data
        if not data.promoted:
            data.newest, data.stale = 0, True
            found = await self._metadata.content(self._state.id)
            if found.content is not None:
                data.adopt(found.inode.inline_version, found.content)
                self._measure(found.inode)
                return
        await self.promote()

    # ------------------------------------------------------------ settling

    async def settle(
        self, session: SessionId, *, close: bool, durable: bool, want_stop: int = 0
    ) -> bool:
        """Tell content, length and mtime; False if the file has got chunks, and nothing is told.

        To `want_stop` the file is about to grow.
        """
        data, state = self.data, self._state
        for _ in range(SETTLE_TRIES):
            if data.outdated:
                await self._catch_up()
            if state.small is not self:
                return False
            if data.outdated:
                continue
            try:
                await self._tell(session, close=close, durable=durable, want_stop=want_stop)
            except EmberfsError as problem:
                if problem.code != Code.SUPERSEDED:
                    raise
                data.stale = True
                state.ended.discard(session)  # chunks may have to be written first
            else:
                return True
        await self.promote()
        return False

    async def _tell(
        self, session: SessionId, *, close: bool, durable: bool, want_stop: int
    ) -> None:
        data, state = self.data, self._state
        tell = bool(data.dirty) or (durable and data.unstable)
        content = data.begin() if tell else None
        mtime_ns, state.mtime_ns = state.mtime_ns, None
        if close:
            state.ended.add(session)
        try:
            answer = await self._metadata.settle(
                state.id,
                session,
                length=state.length if tell else None,
                truncate_version=state.truncate_version,
                mtime_ns=mtime_ns,
                close=close,
                durable=durable,
                content=content,
                inline_version=data.version,
                want=max(0, want_stop - (state.length if tell else state.server_length)),
            )
        except BaseException as problem:
            data.fail()
            if state.mtime_ns is None:
                state.mtime_ns = mtime_ns
            state.note_failure(problem)
            raise
        if tell:
            data.succeed(answer.inline_version, durable=durable)
        state.settled_ns = self._env.now_ns()
        self.note(answer)

    # ------------------------------------------------------------ chunks

    async def promote(self) -> None:
        """Let the file have chunks; own writes that meta does not know go to the write buffer."""
        data, state = self.data, self._state
        data.leaving = True
        try:
            inode = await self._metadata.promote(state.id)
            await state.leave_inline(inode, data.leave(inode.inline_version))
        except BaseException as problem:
            state.note_failure(problem)
            raise
        finally:
            data.leaving = False

    async def was_cut(self, inode: Inode) -> None:
        """Under the exclusive lock: meta has set the length."""
        data = self.data
        data.cut(inode.inline_version, inode.length)
        self.note(inode)
        self._measure(inode)
        if not inode.inline:
            await self.promote()
