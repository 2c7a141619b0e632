"""How long a file is whose writer vanished: what it was told is written must stay readable.

A writer settles the length at fsync and close. One that died between a write and that has left
chunks behind the end that meta knows; they are looked for before its session ends. Bytes whose
write was never acknowledged may be among them: they were written as well.

Whoever opens the file for writing meanwhile begins behind them (adopt), and so does who sets a
length: the file is as long as its dead writer had made it, then shrinks or grows over zeros. What
else lies behind, of a write that failed, is cut before the file grows over it (clear_behind); a
writer that knows of such a write says so, and the next one finds the file cut (clear_torn). What
a living writer has not settled yet is left alone: it is part of the file, and only that writer
knows how far it reaches.
"""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.meta import schema
from emberfs.meta.attributes import after_write
from emberfs.meta.context import Context
from emberfs.meta.quota import charge_growth
from emberfs.meta.tree import find_inode, store_inode
from emberfs.meta.trims import Chunks, Trims, cut_behind
from emberfs.proto.files import Inode
from emberfs.proto.ids import SECOND, InodeId
from emberfs.proto.meta_calls import CreateRequest, OpenRequest, RequestId, SetattrRequest

TIMEOUT_NS = 10 * SECOND


class Measured(NamedTuple):
    """Where the chunks of a file end, in bytes, as of a truncate version."""

    truncate_version: int
    end: int


async def measure(
    engine: Engine, chunks: Chunks, trims: Trims, inode_id: InodeId
) -> Measured | None:
    """Look at the chunks behind the known end; None if there is no such file.

    A cut that is still to be made comes first: what it removes is not part of the file. Raises what
    hinders either.
    """
    await trims.finish(inode_id)

    async def find(txn: Transaction) -> Inode | None:
        return await find_inode(txn, inode_id)

    inode = await engine.run(find, read_only=True)
    if inode is None or inode.layout is None or inode.inline:
        return None  # nothing is written to an inline file but by settling it
    first = inode.length // inode.layout.chunk_bytes
    end = await chunks.end_of(inode_id, inode.layout, first, TIMEOUT_NS)
    return Measured(inode.truncate_version, end)


async def adopt(context: Context, inode_id: InodeId) -> bool:
    """Before a writer opens: what dead writers have written becomes part of the file."""

    async def orphaned(txn: Transaction) -> bool:
        return any(_is_dead(context, writer) for writer in await _writers(txn, inode_id))

    if not await context.engine.run(orphaned, read_only=True):
        return False
    measured = await measure(context.engine, context.chunks, context.trims, inode_id)

    async def grow(txn: Transaction) -> bool:
        inode = await find_inode(txn, inode_id)
        if inode is None or measured is None or measured.end <= inode.length:
            return False
        if measured.truncate_version != inode.truncate_version:
            return False  # cut meanwhile, and with it what was measured
        now_ns = context.env.wall_ns()
        grown = after_write(inode, privileged=False, now_ns=now_ns, mtime_ns=None)
        await charge_growth(txn, inode, measured.end, forced=True)
        store_inode(txn, replace(grown, length=measured.end))
        return True

    return await context.engine.run(grow)


def told_length(inode: Inode, request: object) -> int:
    """How long the file is by all that was told: by meta's record, and by the caller that sets it.

    A settlement that was not durable, a power cut has made us forget; its writer has not. A version
    that is higher than ours is that of a cut which was undone in the same way, before it cut.
    """
    if isinstance(request, SetattrRequest) and request.truncate_version >= inode.truncate_version:
        return max(inode.length, request.written)
    return inode.length


async def clear_behind(
    context: Context,
    inode_id: InodeId,
    request: CreateRequest | OpenRequest | SetattrRequest,
    length: int,
    check: Callable[[Transaction, Inode], Awaitable[None]],
) -> None:
    """Before a request sets the length to `length`: nothing lies behind the end that is not known.

    What the dead have written becomes part of the file, as when it is opened; the rest is cut.

    Does nothing for a file that shrinks, whose cut does that; nor for a late copy of the request:
    its client, whose writes were settled when it asked, has written again since. `check` raises if
    the caller may not.
    """

    async def nobody_writes(txn: Transaction) -> Inode | None:
        inode = await find_inode(txn, inode_id)
        if inode is None or inode.layout is None or inode.inline:
            return None
        if length < told_length(inode, request):
            return None
        if await context.replies.is_known(txn, request.request):
            return None
        await check(txn, inode)
        client = request.request.client
        others = [w for w in await _writers(txn, inode_id) if w.client != client]
        return inode if all(_is_dead(context, other) for other in others) else None

    inode = await context.engine.run(nobody_writes, read_only=True)
    if inode is None or inode.layout is None:
        return
    if length > inode.length and await adopt(context, inode_id):
        return
    told = told_length(inode, request)
    first = told // inode.layout.chunk_bytes
    if await context.chunks.end_of(inode_id, inode.layout, first, TIMEOUT_NS) <= told:
        return

    async def record(txn: Transaction) -> None:
        now = await nobody_writes(txn)
        if now is not None:
            await cut_behind(txn, now, told_length(now, request), context.tenure)

    await context.engine.run(record)
    await context.trims.perform(inode_id)


class TornError(Exception):
    """An open finds a file that a failed write may have left bytes in, behind its end."""

    def __init__(self, inode: InodeId) -> None:
        super().__init__(f"inode {inode} is torn")
        self.inode = inode


async def check_whole(txn: Transaction, inode: Inode) -> None:
    """Raise TornError if what lies behind the end is to be cut before the file is written on.

    While others write, or the dead have not been settled, nobody can tell whose bytes those are.
    """
    if inode.torn and not await _writers(txn, inode.id):
        raise TornError(inode.id)


async def clear_torn(context: Context, inode_id: InodeId, request: RequestId) -> None:
    """Cut what a failed write has left; for no late copy, whose client has written again since."""

    async def record(txn: Transaction) -> None:
        inode = await find_inode(txn, inode_id)
        if inode is None or not inode.torn or await context.replies.is_known(txn, request):
            return
        if not await _writers(txn, inode_id):
            await cut_behind(txn, inode, inode.length, context.tenure)
            store_inode(txn, replace(inode, torn=False))

    await context.trims.finish(inode_id)
    await context.engine.run(record)
    await context.trims.perform(inode_id)


async def _writers(txn: Transaction, inode_id: InodeId) -> list[schema.Session]:
    """Return the sessions that may write the file."""
    rows = await txn.get_range(*keys.session_span(inode_id))
    sessions = [schema.SESSION.decode(value) for _, value in rows]
    return [session for session in sessions if session.write]


def _is_dead(context: Context, session: schema.Session) -> bool:
    return context.clients.is_dead(session.client, session.since)
