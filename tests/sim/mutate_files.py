"""Mutations of the file library: buffers, lengths, retries of metadata calls."""

from typing import Any

import msgspec

from emberfs.client.description import OpenFile
from emberfs.client.filestate import FileState
from emberfs.client.metadata import Metadata
from emberfs.client.nodecalls import NodeCalls
from emberfs.client.openfile import OpenFiles
from emberfs.client.readcache import ReadCache
from emberfs.client.writebuffer import WriteBuffer
from emberfs.proto import meta_calls as calls
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.method import Method
from sim.mutate_meta import CONTENT, FOUND, NAMES
from sim.mutations import Patch, mutation


@mutation("names, meta storm", NAMES)
def metadata_retries_get_new_ids(patch: Patch) -> None:
    """Every try of a metadata call has a request id of its own."""
    methods = {m.number: m for m in vars(calls).values() if isinstance(m, Method)}

    def make(original: Any) -> Any:
        async def call(self: Any, node: Any, method: int, body: Any, **more: Any) -> Any:
            known = methods.get(method)
            if known is not None:
                request = known.decode_request(body)
                if hasattr(request, "request"):
                    number = request.request.sequence + (self._count + 1 << 32)
                    new = calls.RequestId(request.request.client, number)
                    body = known.encode_request(msgspec.structs.replace(request, request=new))
            return await original(self, node, method, body, **more)

        return call

    patch.wrap(NodeCalls, "call", make)


@mutation("files", CONTENT)
def lengths_are_not_settled(patch: Patch) -> None:
    """fsync and close do not tell the length of the file."""

    def make(original: Any) -> Any:
        async def settle(self: Any, inode: Any, session: Any, **more: Any) -> Any:
            return await original(self, inode, session, **{**more, "length": None})

        return settle

    patch.wrap(Metadata, "settle", make)


@mutation("files", CONTENT)
def close_does_not_wait(patch: Patch) -> None:
    """close and fsync do not wait for what is buffered."""

    def make(original: Any) -> Any:
        async def drain(self: Any, *range_: int) -> None:
            if range_:
                await original(self, *range_)
            else:
                self.push_all()

        return drain

    patch.wrap(WriteBuffer, "drain", make)


@mutation("files, names", CONTENT)
def buffered_bytes_are_not_read(patch: Patch) -> None:
    """Reads of a client do not look into its own write buffer."""
    patch.set(WriteBuffer, "pending", lambda *_: [])


@mutation("files, names", CONTENT)
def caches_are_not_invalidated(patch: Patch) -> None:
    """What was read ahead stays when the client itself writes."""
    patch.set(ReadCache, "invalidate", lambda *_: None)


@mutation("files, names", CONTENT)
def cuts_forget_the_buffer(patch: Patch) -> None:
    """A truncation does not wait for writes that are under way."""

    async def drain_for_cut(self: Any) -> None:
        return

    patch.set(FileState, "_drain_for_cut", drain_for_cut)


@mutation("files, metas", CONTENT)
def cuts_tell_no_writes_below_the_end(patch: Patch) -> None:
    """Who cuts a file has told before what it wrote behind the end, and nothing else."""
    patch.set(FileState, "_untold", lambda self, stop: stop > self.server_length)


@mutation("files, names", f"{FOUND}")
def sessions_stay_open(patch: Patch) -> None:
    """close does not end the session."""

    async def end(self: Any, wrote: bool) -> None:
        if wrote:
            await self._state.settle(self.session, durable=True)
        self._services.forget(self)

    patch.set(OpenFile, "_end", end)


@mutation("metas and storage", f"{FOUND}")
def failed_closes_keep_their_session(patch: Patch) -> None:
    """Who could not end a session in time forgets it."""

    async def end_later(self: Any, problem: Any, wrote: bool) -> None:
        self._services.forget(self)

    patch.set(OpenFile, "_end_later", end_later)


@mutation("gentle files", CONTENT)
def sessions_that_came_back_end_at_once(patch: Patch) -> None:
    """The end of a session that was opened anew overtakes the close of its file."""

    def end_again(self: Any, file: Any) -> None:
        self._abandon(file.session, EmberfsError(Code.TIMEOUT), file.inode_id)

    patch.set(OpenFiles, "_end_again", end_again)


@mutation("meta power", CONTENT)
def cuts_tell_no_length(patch: Patch) -> None:
    """Who cuts a file does not say how far it has written."""
    patch.set(FileState, "written", property(lambda _: 0))
