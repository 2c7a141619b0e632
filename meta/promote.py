"""An inline file that grows gets chunks, for good.

The content is written to a chunk and flushed before the file is told to have chunks, in one
transaction that looks whether it is still the content. Chunks are named by an id that nobody had
before (Layout.data): a late write of an attempt that was given up, of this life of the server or of
another, lands where nobody reads. What it leaves is collected: here by the deletion queue, after a
death of the server by the search for chunks without owner (meta/orphans.py). A server that begins
to search bars the ids of all blocks that it will look at: no file of any server gets one of them
any more, so an attempt under way fails and takes a new id. fsck waits longer than ATTEMPT_NS.

A file without content needs no chunk, and takes its own id as nobody can have written under it.

Nobody may write chunks that a power cut would take back with the promotion. So no client believes
that a file has chunks but by an answer of OPEN or PROMOTE, and both wait until that is stable.
"""

import asyncio
import logging

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction, unpack_counter
from emberfs.meta import schema
from emberfs.meta.context import Context
from emberfs.meta.inline import answer
from emberfs.meta.inode_ids import BLOCK_IDS
from emberfs.meta.tree import load_inode, store_inode
from emberfs.meta.trims import make_stable
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode, Layout
from emberfs.proto.ids import MS, SECOND, InodeId
from emberfs.proto.meta_calls import PROMOTE, InodeAnswer, PromoteRequest
from emberfs.runtime.retry import Backoff

log = logging.getLogger("emberfs.meta.promote")

CHUNK_TIMEOUT_NS = 10 * SECOND
ATTEMPT_NS = 30 * SECOND  # from the first byte to the transaction; below fsck's time of grace
RETRY_FIRST_NS = 200 * MS
RETRY_MAX_NS = 10 * SECOND
TRIES = 8  # each means that somebody has settled or cut in between


class _MovedError(Exception):
    """The content is another one by now, it took too long, its chunk is lost, or the id barred."""


async def promote(context: Context, request: PromoteRequest) -> InodeAnswer:
    """Give a file chunks. BUSY if it changes all the time."""
    for _ in range(TRIES):
        found = await context.engine.run(lambda txn: answer(txn, request.inode, 0), read_only=True)
        if found.content is None:
            if not found.inode.is_file():
                raise EmberfsError(Code.INVALID, f"inode {request.inode} is not a regular file")
            await stable(context, found.inode.id)
            return InodeAnswer(found.inode)
        try:
            return await _attempt(context, request, found.inode, found.content)
        except _MovedError:
            continue
    raise EmberfsError(Code.BUSY, f"inode {request.inode} changes all the time")


async def stable(context: Context, inode: InodeId) -> None:
    """Return when a power cut cannot take back any more that the file has chunks."""
    if inode in context.promoting:
        await context.engine.sync()


async def new_data_id(context: Context, inode: Inode) -> InodeId:
    """Return an id that no chunk was ever named by, not even in an attempt."""
    return await context.ids.take(above=await context.engine.run(barred_block, read_only=True))


async def barred_block(txn: Transaction) -> int:
    """Return up to which block ids are searched for lost chunks, and given to no file any more."""
    value = await txn.get(keys.BARRED_BLOCK_KEY)
    return -1 if value is None else unpack_counter(value)


def is_same(now: Inode, inode: Inode) -> bool:
    """Tell whether a file has still the content that was read with `inode`."""
    return now.inline and now.inline_version == inode.inline_version


async def _attempt(
    context: Context, request: PromoteRequest, inode: Inode, content: bytes
) -> InodeAnswer:
    assert inode.layout is not None
    began_ns, layout = context.env.now_ns(), inode.layout
    if content:
        layout = replace(layout, data=await new_data_id(context, inode))

    async def work(txn: Transaction) -> InodeAnswer:
        now = await load_inode(txn, inode.id)
        if not is_same(now, inode) or context.env.now_ns() - began_ns > ATTEMPT_NS:
            raise _MovedError
        if layout.data and layout.data // BLOCK_IDS <= await barred_block(txn):
            raise _MovedError
        promoted = replace(now, inline=False, layout=layout)
        store_inode(txn, promoted)
        txn.clear(keys.inline_key(inode.id))
        if layout.data:
            txn.set(keys.owner_key(layout.data), keys.pack_owner(inode.id))
        return InodeAnswer(promoted)

    used = False
    try:
        await _write(context, inode.id, layout, content)
        context.promoting.add(inode.id)
        made = await context.replies.run(PROMOTE, request.request, work, durable=True)
        context.promoting.discard(inode.id)
        used = made.inode.layout == layout
        return made
    finally:
        if not used and layout.data:  # also when the call is cancelled, or the store is away
            name = f"give up data id {layout.data}"
            await asyncio.shield(context.tasks.spawn(give_up(context, layout), name=name))


async def _write(context: Context, inode: InodeId, layout: Layout, content: bytes) -> None:
    if content:
        chunks, data = context.chunks, memoryview(content)
        done = await chunks.write(inode, layout, 0, data, timeout_ns=CHUNK_TIMEOUT_NS)
        if not await make_stable(chunks, CHUNK_TIMEOUT_NS, done):
            raise _MovedError


async def give_up(context: Context, layout: Layout) -> None:
    """Chunks of an attempt that came to nothing go to the collector, unless it did take effect.

    What it was is certain here: no transaction begins before the one of the attempt is decided.
    """

    async def work(txn: Transaction) -> None:
        if await txn.get(keys.owner_key(layout.data)) is None:
            key = keys.deleted_key(context.env.wall_ns(), layout.data)
            txn.set(key, schema.DELETED.encode(schema.Deleted(layout)))

    backoff = Backoff(RETRY_FIRST_NS, RETRY_MAX_NS)
    while True:
        try:
            await context.engine.run(work)
            break
        except EmberfsError as problem:
            log.info("chunks of data id %d stay for now: %s", layout.data, problem)
            await context.env.sleep_ns(backoff.next_ns(context.env.random))
    context.collector.wake()
