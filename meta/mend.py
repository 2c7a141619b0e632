"""Repairs that fsck asks for. Each is one transaction that looks again before it acts.

The evidence (`Mend.expected`, a record as fsck saw it) must still be what is stored. Every change
of a file's names changes its inode record, so an equal inode record means equal names.
"""

import stat
from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction, unpack_counter
from emberfs.meta import schema
from emberfs.meta.context import Context
from emberfs.meta.mend_quota import correct_usage, drop_quota, recount
from emberfs.meta.quota import recounted
from emberfs.meta.records import count_inodes
from emberfs.meta.tree import (
    add_inode,
    destroy,
    find_entry,
    find_inode,
    has_sessions,
    load_inode,
    store_entry,
    store_inode,
    touch_directory,
)
from emberfs.meta.trims import cut_behind
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import ROOT_INODE, InodeId
from emberfs.proto.meta_calls import MEND, Mend, MendKind, MendRequest, Nothing

LOST_AND_FOUND = b"lost+found"

Work = Callable[[Transaction, Context, Mend], Awaitable[None]]


async def mend(context: Context, request: MendRequest) -> Nothing:
    """Perform one repair. STALE when what was seen has changed meanwhile."""
    wanted = request.mend
    spare = await context.ids.take() if wanted.kind == MendKind.ATTACH else InodeId(0)

    async def work(txn: Transaction) -> Nothing:
        if wanted.kind == MendKind.ATTACH:
            await _attach(txn, context, wanted, spare)
        else:
            await _WORKS[wanted.kind](txn, context, wanted)
        return Nothing()

    # A trim must be known as pending before anybody else runs; it syncs by itself.
    trims = wanted.kind == MendKind.TRIM
    answer = await context.replies.run(MEND, request.request, work, durable=not trims)
    if trims:
        await context.trims.perform(wanted.inode)
    context.collector.wake()
    context.quota_walks.wake()
    return answer


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise EmberfsError(Code.STALE, f"{what} has changed since it was looked at; look again")


async def _unchanged(txn: Transaction, wanted: Mend) -> Inode:
    """Return the inode, which is still as fsck saw it."""
    value = await txn.get(keys.inode_key(wanted.inode))
    _require(value == wanted.expected, f"inode {wanted.inode}")
    return schema.INODE.decode(wanted.expected)


async def _entry(txn: Transaction, wanted: Mend) -> schema.Entry:
    """Return the entry, which is still as fsck saw it."""
    value = await txn.get(keys.entry_key(wanted.parent, wanted.name))
    _require(value == wanted.expected, f"{wanted.name!r} in directory {wanted.parent}")
    return schema.ENTRY.decode(wanted.expected)


async def _drop_entry(txn: Transaction, context: Context, wanted: Mend) -> None:
    entry = await _entry(txn, wanted)
    inode = await find_inode(txn, entry.inode)
    parent = await find_inode(txn, wanted.parent)
    orphaned = parent is None or not parent.is_directory()
    second = inode is not None and inode.is_directory() and inode.parent != wanted.parent
    _require(orphaned or second or inode is None, f"{wanted.name!r} in directory {wanted.parent}")
    txn.clear(keys.entry_key(wanted.parent, wanted.name))


async def _fix_entry(txn: Transaction, context: Context, wanted: Mend) -> None:
    entry = await _entry(txn, wanted)
    inode = await load_inode(txn, entry.inode)
    store_entry(txn, wanted.parent, wanted.name, inode)


async def _set_links(txn: Transaction, context: Context, wanted: Mend) -> None:
    inode = await _unchanged(txn, wanted)
    now_ns = context.env.wall_ns()
    store_inode(txn, replace(inode, nlink=wanted.number, ctime_ns=now_ns))


async def _set_parent(txn: Transaction, context: Context, wanted: Mend) -> None:
    inode = await _unchanged(txn, wanted)
    entry = await find_entry(txn, wanted.parent, wanted.name)
    _require(entry is not None and entry.inode == inode.id, f"{wanted.name!r}")
    store_inode(txn, replace(inode, parent=wanted.parent, ctime_ns=context.env.wall_ns()))


async def _attach(txn: Transaction, context: Context, wanted: Mend, spare: InodeId) -> None:
    inode = await _unchanged(txn, wanted)
    now_ns = context.env.wall_ns()
    if wanted.name:
        entry = await find_entry(txn, wanted.parent, wanted.name)
        _require(entry is not None and entry.inode == inode.id, f"{wanted.name!r}")
        txn.clear(keys.entry_key(wanted.parent, wanted.name))
    place = await _lost_and_found(txn, spare, now_ns)
    name = b"#%d" % inode.id
    _require(await find_entry(txn, place.id, name) is None, f"{name!r}")
    parent = place.id if inode.is_directory() else inode.parent
    nlink = inode.nlink if inode.is_directory() else 1
    found = replace(inode, parent=parent, nlink=nlink, ctime_ns=now_ns)
    found = await recounted(txn, found, place)
    store_inode(txn, found)
    store_entry(txn, place.id, name, found)
    touch_directory(txn, place, now_ns, links=int(inode.is_directory()))


async def _lost_and_found(txn: Transaction, spare: InodeId, now_ns: int) -> Inode:
    """Return /lost+found, made as inode `spare` if it is not there."""
    entry = await find_entry(txn, ROOT_INODE, LOST_AND_FOUND)
    if entry is not None:
        found = await load_inode(txn, entry.inode)
        if not found.is_directory():
            text = "/lost+found is not a directory: rename it, then run fsck again"
            raise EmberfsError(Code.NOT_DIRECTORY, text)
        return found
    root = await load_inode(txn, ROOT_INODE)
    made = Inode(
        id=spare,
        mode=stat.S_IFDIR | 0o700,
        uid=root.uid,
        gid=root.gid,
        nlink=2,
        length=0,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        parent=ROOT_INODE,
        quota=root.quota,
    )
    await add_inode(txn, made)
    store_entry(txn, ROOT_INODE, LOST_AND_FOUND, made)
    touch_directory(txn, root, now_ns, links=1)
    return made


async def _destroy(txn: Transaction, context: Context, wanted: Mend) -> None:
    inode = await _unchanged(txn, wanted)
    _require(inode.nlink == 0 and not await has_sessions(txn, inode.id), f"inode {inode.id}")
    await destroy(txn, inode, context.env.wall_ns())


async def _drop_record(txn: Transaction, context: Context, wanted: Mend) -> None:
    key = wanted.name
    _require(await txn.get(key) == wanted.expected, f"record {key.hex()}")
    prefix = key[:1]
    if prefix in (keys.Prefix.SESSION, keys.Prefix.XATTR, keys.Prefix.TRIM):
        _require(await find_inode(txn, wanted.inode) is None, f"inode {wanted.inode}")
    elif prefix == keys.Prefix.INLINE:
        inode = await find_inode(txn, wanted.inode)
        _require(inode is None or not inode.inline, f"inode {wanted.inode}")
    elif prefix == keys.Prefix.OWNER:
        inode = await find_inode(txn, wanted.inode)
        has = inode is not None and inode.layout is not None and inode.layout.data
        _require(not has or keys.owner_key(has) != key, f"inode {wanted.inode}")
    elif prefix == keys.Prefix.DELETED:
        _require(await find_inode(txn, wanted.inode) is not None, f"inode {wanted.inode}")
    elif prefix == keys.Prefix.REMOVED:
        inode = await find_inode(txn, wanted.inode)
        _require(inode is not None and bool(inode.parent), f"inode {wanted.inode}")
        txn.add(keys.REMOVED_COUNT_KEY, -1)
    elif prefix not in (keys.Prefix.REPLY, keys.Prefix.REPLY_AGE, keys.Prefix.TRASH):
        raise EmberfsError(Code.INVALID, f"records of kind {prefix!r} are not dropped")
    txn.clear(key)


async def _end_session(txn: Transaction, context: Context, wanted: Mend) -> None:
    key = keys.session_key(wanted.inode, wanted.number)
    _require(await txn.get(key) == wanted.expected, f"session {wanted.number}")
    txn.clear(key)
    inode = await find_inode(txn, wanted.inode)
    if inode is not None and inode.nlink == 0 and not await has_sessions(txn, inode.id):
        await destroy(txn, inode, context.env.wall_ns())


async def _set_counter(txn: Transaction, context: Context, wanted: Mend) -> None:
    """Adds never conflict, so the difference of one moment is right at any later one."""
    counter = unpack_counter(await txn.get(keys.INODE_COUNT_KEY, snapshot=True))
    difference = await count_inodes(context, txn) - counter
    if difference:
        txn.add(keys.INODE_COUNT_KEY, difference)


async def _trim(txn: Transaction, context: Context, wanted: Mend) -> None:
    inode = await _unchanged(txn, wanted)
    for _, value in await txn.get_range(*keys.session_span(inode.id)):
        _require(not schema.SESSION.decode(value).write, f"inode {inode.id}")
    if inode.layout is None or inode.inline:
        raise EmberfsError(Code.INVALID, f"inode {inode.id} is no regular file with chunks")
    await cut_behind(txn, inode, inode.length, context.tenure)


async def _own_data(txn: Transaction, context: Context, wanted: Mend) -> None:
    inode = await _unchanged(txn, wanted)
    if inode.layout is None or not inode.layout.data:
        raise EmberfsError(Code.INVALID, f"inode {inode.id} has no data id")
    key = keys.owner_key(inode.layout.data)
    _require(await txn.get(key) is None, f"the owner of data id {inode.layout.data}")
    txn.set(key, keys.pack_owner(inode.id))


_WORKS: dict[MendKind, Work] = {
    MendKind.DROP_ENTRY: _drop_entry,
    MendKind.FIX_ENTRY: _fix_entry,
    MendKind.SET_LINKS: _set_links,
    MendKind.SET_PARENT: _set_parent,
    MendKind.DESTROY: _destroy,
    MendKind.DROP_RECORD: _drop_record,
    MendKind.END_SESSION: _end_session,
    MendKind.SET_COUNTER: _set_counter,
    MendKind.TRIM: _trim,
    MendKind.OWN_DATA: _own_data,
    MendKind.SET_USAGE: correct_usage,
    MendKind.RECOUNT: recount,
    MendKind.DROP_QUOTA: drop_quota,
}
