"""Mutations of the metadata server: names, replies, sessions, lengths, collection."""

import asyncio
from typing import Any

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Engine
from emberfs.meta import dispatch, files, namespace, rename, schema, sessions, tree, vanished
from emberfs.meta.collect import Collector
from emberfs.meta.inode_ids import InodeIds
from emberfs.meta.replies import Replies
from emberfs.meta.server import MetaService
from emberfs.meta.sessions import SessionSweeper
from emberfs.meta.trims import Trims
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import SessionId
from emberfs.proto.meta_calls import RENAME, RemoveRequest, RequestId
from sim.mutations import Patch, mutation

NAMES = "names, unreadable"
CONTENT = "file content, file length"
FOUND = "fsck, left over"


@mutation("names, meta storm", NAMES)
def replies_are_not_kept(patch: Patch) -> None:
    """A retried call is performed again."""

    async def run(self: Any, method: Any, request: Any, work: Any, *, durable: bool = False) -> Any:
        return await self._engine.run(work, durable=durable)

    patch.set(Replies, "run", run)


@mutation("names, meta storm, files", NAMES)
def replies_are_kept_apart(patch: Patch) -> None:
    """The memory of a reply is another transaction than the effect."""

    def make(original: Any) -> Any:
        async def run(
            self: Any, method: Any, request: Any, work: Any, *, durable: bool = False
        ) -> Any:
            done: list[Any] = []

            async def remembered(txn: Any) -> Any:
                answer = await work(txn)
                if not txn.changes_something:
                    return answer
                txn.cancel()
                raise _SplitError

            try:
                return await original(self, method, request, remembered, durable=durable)
            except _SplitError:
                done.append(await self._engine.run(work, durable=durable))
                await asyncio.sleep(0.0001)

            async def record(txn: Any) -> Any:
                txn.add_write_conflict(b"~", b"~~")
                return done[0]

            return await original(self, method, request, record)

        return run

    patch.wrap(Replies, "run", make)


class _SplitError(Exception):
    pass


@mutation("names", NAMES)
def failures_are_performed_again(patch: Patch) -> None:
    """A held-up copy of a call that failed is performed when it arrives."""
    patch.set(Replies, "_note", lambda *_: None)


@mutation("names, files", f"{NAMES}, {CONTENT}")
def answers_come_before_commits(patch: Patch) -> None:
    """The transaction of a call commits when the answer is on its way."""

    def make(original: Any) -> Any:
        async def run(
            self: Any, method: Any, request: Any, work: Any, *, durable: bool = False
        ) -> Any:
            txn = self._engine.begin()
            answer = await work(txn)

            async def later() -> None:
                try:
                    await original(self, method, request, work)
                except EmberfsError:
                    return

            txn.cancel()
            loop = asyncio.get_running_loop()
            loop.call_later(0.002, lambda: loop.create_task(later()))
            return answer

        return run

    patch.wrap(Replies, "run", make)


@mutation("files", CONTENT)
def sessions_end_before_the_length_is_told(patch: Patch) -> None:
    """A close ends the session although the length has to be told again."""
    patch.set(files, "_is_told_again", lambda *_: False)


@mutation("files, lost clients", FOUND)
def sessions_never_end(patch: Patch) -> None:
    """Nobody looks for the sessions of dead clients."""

    async def sweep(self: Any) -> int:
        return 0

    patch.set(SessionSweeper, "sweep", sweep)


@mutation("meta storm", CONTENT)
def old_routing_ends_sessions(patch: Patch) -> None:
    """A server that is out of touch with mgmtd judges by what it knew before."""
    patch.set(MetaService, "_routing_is_fresh", lambda *_: True)


@mutation("names, files", f"{CONTENT}, {FOUND}, error at a client")
def open_files_are_not_kept(patch: Patch) -> None:
    """An unlink frees the file although it is open."""

    async def has_sessions(txn: Any, inode: Any) -> bool:
        return False

    for module in (tree, files, sessions):
        patch.set(module, "has_sessions", has_sessions)


@mutation("meta power", f"{CONTENT}, {FOUND}")
def chunks_go_before_it_is_stable(patch: Patch) -> None:
    """Chunks of a deleted file are removed before its deletion is on stable storage."""

    def make(original: Any) -> Any:
        async def collect(self: Any) -> Any:
            engine = self._engine
            self._engine = _NoSync(engine)
            try:
                return await original(self)
            finally:
                self._engine = engine

        return collect

    patch.wrap(Collector, "collect", make)


class _NoSync:
    def __init__(self, engine: Engine) -> None:
        self.run = engine.run

    async def sync(self) -> None:
        return


@mutation("names, files", f"{FOUND}")
def deleted_files_are_not_collected(patch: Patch) -> None:
    """The queue of deleted files is left alone."""

    async def collect(self: Any) -> int:
        return 0

    patch.set(Collector, "collect", collect)


@mutation("names, meta storm", NAMES)
def rename_is_two_steps(patch: Patch) -> None:
    """What a rename replaces is removed in a transaction of its own, before."""

    async def two_steps(context: Any, request: Any) -> Any:
        own = RequestId(request.request.client, request.request.sequence | 1 << 40)
        first = RemoveRequest(
            request.caller, own, request.new_parent, request.new_name, directory=False
        )
        if (request.parent, request.name) != (request.new_parent, request.new_name):
            try:
                await namespace.remove(context, first)
            except EmberfsError:
                pass
        return await rename.rename(context, request)

    bindings = tuple(
        dispatch.Binding(b.method, two_steps) if b.method is RENAME else b
        for b in dispatch.BINDINGS
    )
    patch.set(dispatch, "BINDINGS", bindings)


@mutation("names, meta storm", f"{NAMES}, {FOUND}")
def directories_may_be_full(patch: Patch) -> None:
    """A directory is removed or replaced although there are names in it."""

    async def is_empty(txn: Any, inode: Any) -> bool:
        return True

    patch.set(namespace, "is_empty", is_empty)
    patch.set(rename, "is_empty", is_empty)


@mutation("names, meta storm", f"{NAMES}, {FOUND}")
def directories_move_below_themselves(patch: Patch) -> None:
    """Nobody looks for loops."""

    async def check_loops(self: Any) -> None:
        return

    patch.set(rename._Move, "check_loops", check_loops)


@mutation("names, files", f"{NAMES}, {FOUND}")
def links_are_not_counted(patch: Patch) -> None:
    """A hard link leaves the count of links alone."""

    def make(original: Any) -> Any:
        def store_inode(txn: Any, inode: Any) -> None:
            if inode.is_file() and inode.nlink > 1:
                inode = replace(inode, nlink=inode.nlink - 1)
            original(txn, inode)

        return store_inode

    patch.wrap(namespace, "store_inode", make)


@mutation("files, lost clients, files and storage", f"{CONTENT}, {FOUND}")
def lengths_of_the_dead_are_lost(patch: Patch) -> None:
    """The session of a dead writer ends without a look at what it wrote."""

    async def measure(*_: Any) -> None:
        return None

    patch.set(sessions, "measure", measure)
    patch.set(vanished, "measure", measure)


@mutation("meta power, lost clients", CONTENT)
def lengths_are_set_over_the_dead(patch: Patch) -> None:
    """Who lets a file grow cuts what its dead writer had put behind the end."""

    async def adopt(context: Any, inode_id: Any) -> bool:
        return False

    patch.set(vanished, "adopt", adopt)


@mutation("files, lost clients", CONTENT)
def cuts_keep_the_version(patch: Patch) -> None:
    """A truncation does not raise the truncate version: older lengths count afterwards."""

    def make(original: Any) -> Any:
        async def set_length(txn: Any, context: Any, inode: Any, *rest: Any) -> Any:
            changed = await original(txn, context, inode, *rest)
            return replace(changed, truncate_version=inode.truncate_version)

        return set_length

    patch.wrap(files, "_set_length", make)


@mutation("files", f"{CONTENT}, {FOUND}")
def cuts_take_what_is_known_only(patch: Patch) -> None:
    """A truncation leaves what another writer has not told yet."""

    async def is_written(txn: Any, context: Any, inode: Any, but: SessionId) -> bool:
        return False

    patch.set(files, "_is_written", is_written)


@mutation("meta power", CONTENT)
def finished_cuts_come_back(patch: Patch) -> None:
    """The record of a finished truncation is removed without a sync."""

    def make(original: Any) -> Any:
        async def forget(self: Any, key: bytes, value: bytes) -> Any:
            engine = self._engine
            self._engine = _NotDurable(engine)
            try:
                return await original(self, key, value)
            finally:
                self._engine = engine

        return forget

    patch.wrap(Trims, "_forget", make)


class _NotDurable:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.sync = engine.sync

    async def run(self, work: Any, *, read_only: bool = False, durable: bool = False) -> Any:
        return await self._engine.run(work, read_only=read_only)


@mutation("files, meta storm", f"{CONTENT}, {FOUND}")
def cuts_are_not_resumed(patch: Patch) -> None:
    """A truncation that the death of the server interrupted stays unfinished."""

    def make(original: Any) -> Any:
        async def finish(self: Any, inode: Any) -> None:
            value = await self._value(keys.trim_key(inode))
            if value is not None and self._tenure.holds(schema.TRIM.decode(value).owner):
                await original(self, inode)

        return finish

    patch.wrap(Trims, "finish", make)
    patch.set(files, "load_uncut", tree.load_inode)


@mutation("meta power", f"{CONTENT}, names not durable, names after a power cut")
def flushed_metadata_is_not_synced(patch: Patch) -> None:
    """A settlement at fsync or close is answered before it is stable."""

    def make(original: Any) -> Any:
        async def run(
            self: Any, method: Any, request: Any, work: Any, *, durable: bool = False
        ) -> Any:
            return await original(self, method, request, work)

        return run

    patch.wrap(Replies, "run", make)


@mutation("meta power", f"{NAMES}, {CONTENT}, {FOUND}, internal error")
def inode_ids_are_used_again(patch: Patch) -> None:
    """The next block of inode ids is reserved without a sync."""

    def make(original: Any) -> Any:
        async def reserve(self: Any) -> Any:
            engine = self._engine
            self._engine = _NotDurable(engine)
            try:
                return await original(self)
            finally:
                self._engine = engine

        return reserve

    patch.wrap(InodeIds, "_reserve", make)
