"""Regular files: create, open, settle lengths, change attributes, truncate.

A file's length is settled by its writers (SettleRequest) and cut by setattr. Cutting raises
`truncate_version`, so that a length hint from before is recognised and ignored. The content of an
inline file comes with both (inline.py).
"""

import stat
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta import inline, schema
from emberfs.meta.attributes import after_write, is_privileged, with_attributes
from emberfs.meta.context import Context
from emberfs.meta.namespace import add_name, check_new_name, new_inode
from emberfs.meta.permission import EXECUTE, READ, WRITE, require
from emberfs.meta.promote import stable
from emberfs.meta.quota import charge_growth, grant_bytes
from emberfs.meta.tree import (
    destroy,
    find_entry,
    has_sessions,
    load_directory,
    load_inode,
    store_inode,
)
from emberfs.meta.trims import cut_behind, load_uncut
from emberfs.meta.vanished import (
    TornError,
    adopt,
    check_whole,
    clear_behind,
    clear_torn,
    told_length,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import FILE_BYTES_MAX, Inode
from emberfs.proto.ids import CHUNKS_PER_FILE_MAX, InodeId, SessionId
from emberfs.proto.meta_calls import (
    CREATE,
    OPEN,
    SETATTR,
    SETTLE,
    ContentRequest,
    CreateRequest,
    InodeAnswer,
    OpenAnswer,
    OpenRequest,
    SetattrRequest,
    SettleRequest,
)
from emberfs.proto.method import Method

_SET_ID = stat.S_ISUID | stat.S_ISGID


async def create(context: Context, request: CreateRequest) -> OpenAnswer:
    """Create, open or create-and-open in one transaction."""
    check_new_name(request.name)
    taken = await context.ids.take()
    if request.truncate:
        await _clear_existing(context, request)
    contents: dict[int, bytes] = {}

    async def work(txn: Transaction) -> OpenAnswer:
        parent = await load_directory(txn, request.parent, request.caller, EXECUTE)
        entry = await find_entry(txn, parent.id, request.name)
        if entry is not None:
            inode = await _open_existing(txn, context, request, entry.inode)
        else:
            require(parent, request.caller, WRITE)
            mode = stat.S_IFREG | stat.S_IMODE(request.mode)
            inode = new_inode(context, taken, parent, request.caller, mode, umask=request.umask)
            await add_name(txn, context, parent, request.name, inode)
        _add_session(txn, context, inode.id, request)
        await _note_content(txn, inode, contents)
        room = await grant_bytes(txn, inode) if request.write else None
        return OpenAnswer(inode, room=room, is_new=entry is None)

    answer = await _run_open(context, CREATE, request, work)
    is_new = answer.inode.id == taken  # made by this very try
    opened = await _opened(context, request, answer, contents, is_new=is_new)
    return replace(opened, is_new=answer.is_new)


async def _open_existing(
    txn: Transaction, context: Context, request: CreateRequest, inode_id: InodeId
) -> Inode:
    if request.exclusive:
        raise EmberfsError(Code.EXISTS, f"{request.name!r} exists")
    inode = await load_uncut(txn, inode_id)
    _check_openable(inode)
    changes = request.write or request.truncate
    reads = request.read or not changes
    require(inode, request.caller, (WRITE if changes else 0) | (READ if reads else 0))
    if request.truncate:
        inode = await _set_length(txn, context, inode, 0, request)
        store_inode(txn, inode)
    elif request.write:
        await check_whole(txn, inode)
    return inode


async def _run_open(
    context: Context,
    method: Method[Any, OpenAnswer],
    request: CreateRequest | OpenRequest,
    work: Callable[[Transaction], Awaitable[OpenAnswer]],
) -> OpenAnswer:
    """Perform an open; what a failed write has left behind the end is cut before."""

    async def perform() -> OpenAnswer:
        return await context.replies.run(method, request.request, work)

    while True:
        try:
            return await context.trims.after(perform)
        except TornError as found:
            await clear_torn(context, found.inode, request.request)


def _check_openable(inode: Inode) -> None:
    if inode.is_directory():
        raise EmberfsError(Code.IS_DIRECTORY, f"inode {inode.id} is a directory")
    if inode.is_symlink():
        raise EmberfsError(Code.LOOP, f"inode {inode.id} is a symbolic link: resolve it first")
    if not inode.is_file():
        raise EmberfsError(Code.UNSUPPORTED, f"inode {inode.id} is not a regular file")


def _add_session(
    txn: Transaction, context: Context, inode: InodeId, request: CreateRequest | OpenRequest
) -> None:
    if request.session:
        client = request.request.client
        context.clients.heard(client)
        record = schema.Session(client, request.write, is_privileged(request.caller), request.since)
        txn.set(keys.session_key(inode, request.session), schema.SESSION.encode(record))


async def _note_content(txn: Transaction, inode: Inode, contents: dict[int, bytes]) -> None:
    """Keep the content apart from what the request is remembered by: it may be large."""
    if inode.inline:
        contents[inode.inline_version] = await inline.read_content(txn, inode)


async def _opened(
    context: Context,
    request: CreateRequest | OpenRequest,
    answer: OpenAnswer,
    contents: dict[int, bytes],
    *,
    is_new: bool,
) -> OpenAnswer:
    """Before the file is handed out: a writer begins behind what dead writers have left.

    A retry is answered without content, which the client fetches then.
    """
    inode, limit = answer.inode, context.policy.inline_bytes_max
    if inode.inline:
        if request.truncate and not is_new:
            await context.engine.sync()  # a cut is stable when it is told, as with chunks
        return OpenAnswer(inode, contents.get(inode.inline_version), limit, answer.room)
    await stable(context, inode.id)
    if request.truncate:
        await context.trims.perform(inode.id)
    if request.write and not is_new and await adopt(context, inode.id):
        grown = await context.engine.run(partial(load_inode, inode=inode.id))
        return replace(answer, inode=grown)
    return answer


async def content(context: Context, request: ContentRequest) -> OpenAnswer:
    """Answer an inode with the content that an inline file has at the same moment."""
    limit = context.policy.inline_bytes_max
    work = partial(inline.answer, inode_id=request.inode, limit=limit)
    return await context.engine.run(work, read_only=True)


async def _clear_existing(context: Context, request: CreateRequest) -> None:
    """An empty file is truncated to nothing too: what a dead writer left there goes."""

    async def find(txn: Transaction) -> schema.Entry | None:
        parent = await load_directory(txn, request.parent, request.caller, EXECUTE)
        return await find_entry(txn, parent.id, request.name)

    entry = await context.engine.run(find, read_only=True)
    if entry is not None and stat.S_ISREG(entry.mode) and not request.exclusive:
        await _clear_behind(context, request, entry.inode, 0)


async def _clear_behind(
    context: Context,
    request: CreateRequest | OpenRequest | SetattrRequest,
    inode: InodeId,
    length: int,
) -> None:
    """See vanished.clear_behind; the caller's right to do so is looked at as later on."""
    await context.trims.finish(inode)

    async def check(txn: Transaction, found: Inode) -> None:
        if isinstance(request, SetattrRequest):
            await _check_truncate(txn, found, request)
        else:
            require(found, request.caller, WRITE)

    await clear_behind(context, inode, request, length, check)


async def open_(context: Context, request: OpenRequest) -> OpenAnswer:
    """Check permission and record the session; read sessions too, so that unlink keeps the data."""
    want = (READ if request.read else 0) | (WRITE if request.write or request.truncate else 0)
    if request.truncate:
        await _clear_behind(context, request, request.inode, 0)
    contents: dict[int, bytes] = {}

    async def work(txn: Transaction) -> OpenAnswer:
        inode = await load_uncut(txn, request.inode)
        _check_openable(inode)
        require(inode, request.caller, want)
        if request.truncate:
            inode = await _set_length(txn, context, inode, 0, request)
            store_inode(txn, inode)
        elif request.write:
            await check_whole(txn, inode)
        _add_session(txn, context, inode.id, request)
        await _note_content(txn, inode, contents)
        return OpenAnswer(inode, room=await grant_bytes(txn, inode) if request.write else None)

    answer = await _run_open(context, OPEN, request, work)
    return await _opened(context, request, answer, contents, is_new=False)


# ---------------------------------------------------------------- length


def check_length(inode: Inode, length: int) -> None:
    """Refuse lengths that no file can have: INVALID, FILE_TOO_LARGE."""
    if length < 0:
        raise EmberfsError(Code.INVALID, f"a length of {length} bytes")
    assert inode.layout is not None
    limit = min(FILE_BYTES_MAX, inode.layout.chunk_bytes * CHUNKS_PER_FILE_MAX)
    if length > limit:
        raise EmberfsError(Code.FILE_TOO_LARGE, f"{length} bytes; a file holds at most {limit}")


async def _set_length(
    txn: Transaction,
    context: Context,
    inode: Inode,
    length: int,
    request: CreateRequest | OpenRequest | SetattrRequest,
) -> Inode:
    """Return the inode with a new length; what may lie behind it is recorded to be cut.

    Who else than the caller writes the file may have written behind the end that is known here, and
    tells its length later.
    """
    check_length(inode, length)
    told = told_length(inode, request)
    await charge_growth(txn, inode, length, forced=length <= told)  # so far it is written
    privileged, now_ns = is_privileged(request.caller), context.env.wall_ns()
    sparse = length > told or (inode.sparse and length > 0)
    if inode.inline:
        cut = await inline.cut(txn, context.versions, inode, length)
        written = after_write(cut, privileged=privileged, now_ns=now_ns, mtime_ns=None)
        return replace(written, sparse=sparse)
    version = inode.truncate_version
    others = await _is_written(txn, context, inode.id, request.session)
    if length < told or others:
        await cut_behind(txn, inode, length, context.tenure)
        version += 1
    torn = inode.torn and others and length > told
    written = after_write(inode, privileged=privileged, now_ns=now_ns, mtime_ns=None)
    return replace(written, length=length, truncate_version=version, torn=torn, sparse=sparse)


async def _is_written(txn: Transaction, context: Context, inode: InodeId, but: SessionId) -> bool:
    """Tell whether somebody else may still settle what is written behind the known end.

    What the dead have left there is gone by now: clear_behind.
    """
    own = keys.session_key(inode, but)
    rows = await txn.get_range(*keys.session_span(inode))
    others = [schema.SESSION.decode(value) for key, value in rows if key != own]
    dead = context.clients.is_dead
    return any(one.write and not dead(one.client, one.since) for one in others)


async def setattr_(context: Context, request: SetattrRequest) -> InodeAnswer:
    """Change attributes; a new length cuts the chunks before the answer."""
    if request.length is not None:
        await _clear_behind(context, request, request.inode, request.length)

    async def work(txn: Transaction) -> InodeAnswer:
        load = load_inode if request.length is None else load_uncut
        inode = changed = await load(txn, request.inode)
        if request.length is not None:
            await _check_truncate(txn, inode, request)
            changed = await _set_length(txn, context, inode, request.length, request)
        changed = with_attributes(changed, request, context.env.wall_ns())
        store_inode(txn, changed)
        return InodeAnswer(changed)

    answer = await context.trims.after(lambda: context.replies.run(SETATTR, request.request, work))
    if request.length is not None:
        if answer.inode.inline:
            await context.engine.sync()  # a cut is stable when it is told, as with chunks
        await context.trims.perform(request.inode)
    return answer


async def _check_truncate(txn: Transaction, inode: Inode, request: SetattrRequest) -> None:
    if inode.is_directory():
        raise EmberfsError(Code.IS_DIRECTORY, f"inode {inode.id} is a directory")
    if not inode.is_file():
        raise EmberfsError(Code.INVALID, f"inode {inode.id} is not a regular file")
    if request.session:  # ftruncate: permission was checked when the file was opened
        session = await _find_session(txn, inode.id, request.session)
        if session is not None and session.write:
            return
    require(inode, request.caller, WRITE)


async def _find_session(
    txn: Transaction, inode: InodeId, session: SessionId
) -> schema.Session | None:
    value = await txn.get(keys.session_key(inode, session))
    return None if value is None else schema.SESSION.decode(value)


# ---------------------------------------------------------------- settle


async def settle(context: Context, request: SettleRequest) -> InodeAnswer:
    """Take over a writer's length and times, or content; end its session; make it durable."""

    async def work(txn: Transaction) -> InodeAnswer:
        inode = await load_uncut(txn, request.inode)
        changed = await _settled(txn, context, inode, request)
        if request.close and not _is_told_again(inode, request):
            txn.clear(keys.session_key(inode.id, request.session))
            if inode.nlink == 0 and not await has_sessions(txn, inode.id):
                await destroy(txn, changed, context.env.wall_ns())
                return InodeAnswer(changed)
        if changed is not inode:
            store_inode(txn, changed)
        return InodeAnswer(changed, await grant_bytes(txn, changed, request.want))

    answer = await context.trims.after(
        lambda: context.replies.run(SETTLE, request.request, work, durable=request.durable)
    )
    if answer.inode.nlink == 0:
        context.collector.wake()
    return answer


def _is_told_again(inode: Inode, request: SettleRequest) -> bool:
    """Tell whether the client will tell the length under another truncate version.

    Its session lasts until then: what it wrote would be nobody's, and its file might go.
    """
    if not inode.is_file() or inode.inline:
        return False
    ours, theirs = inode.truncate_version, request.truncate_version
    return theirs > ours or (theirs < ours and request.length is not None)


def _written(context: Context, txn: Transaction, inode: Inode, request: SettleRequest) -> Inode:
    """Return the inode with the length that it has by this request; itself if nothing changes."""
    length = request.length
    if length is not None and inode.is_file():
        check_length(inode, length)
    if request.content is not None:
        return inline.put(txn, context.versions, inode, request)
    if length is None or not inode.is_file() or inode.inline:
        return inode
    if request.truncate_version != inode.truncate_version or length <= inode.length:
        return inode
    return replace(inode, length=length)


async def _settled(
    txn: Transaction, context: Context, inode: Inode, request: SettleRequest
) -> Inode:
    told_again = await inline.has(txn, inode, request)
    written = _written(context, txn, inode, request)
    await charge_growth(txn, inode, written.length, forced=True)  # it is written
    changed = written if told_again else inode
    if not told_again and (written is not inode or request.mtime_ns is not None):
        privileged = True
        if inode.mode & _SET_ID:
            session = await _find_session(txn, inode.id, request.session)
            privileged = session is not None and session.privileged
        changed = after_write(
            written,
            privileged=privileged,
            now_ns=context.env.wall_ns(),
            mtime_ns=request.mtime_ns,
        )
    if request.atime_ns is not None:
        changed = replace(changed, atime_ns=request.atime_ns)
    if request.torn and not changed.torn and inode.is_file() and not inode.inline:
        changed = replace(changed, torn=True)
    if request.sparse and not changed.sparse and inode.is_file():
        changed = replace(changed, sparse=True)
    return changed
