"""Inodes, entries and sessions in a transaction: load, store, link, drop."""

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction, unpack_counter
from emberfs.meta import quota, schema
from emberfs.meta.permission import require
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import ROOT_INODE, TRASH_INODE, InodeId
from emberfs.proto.meta_calls import Caller


async def find_inode(txn: Transaction, inode: InodeId) -> Inode | None:
    """Return the inode, None if there is none."""
    value = await txn.get(keys.inode_key(inode))
    return None if value is None else schema.INODE.decode(value)


async def load_inode(txn: Transaction, inode: InodeId) -> Inode:
    """Return the inode or raise NOT_FOUND."""
    return read_inode(inode, await txn.get(keys.inode_key(inode)))


def read_inode(inode: InodeId, value: bytes | None) -> Inode:
    """Return the inode of a record or raise NOT_FOUND if there is none."""
    if value is None:
        raise EmberfsError(Code.NOT_FOUND, f"inode {inode} does not exist (any more)")
    return schema.INODE.decode(value)


async def load_directory(txn: Transaction, inode: InodeId, caller: Caller, want: int) -> Inode:
    """Return a directory that grants `want`; NOT_FOUND, NOT_DIRECTORY, ACCESS."""
    found = await load_inode(txn, inode)
    if not found.is_directory():
        raise EmberfsError(Code.NOT_DIRECTORY, f"inode {inode} is not a directory")
    await check_reachable(txn, found)
    require(found, caller, want)
    return found


async def check_reachable(txn: Transaction, directory: Inode) -> None:
    """Raise NOT_FOUND in a tree that was removed as a whole and is not taken to pieces yet.

    While there is none, that costs a look at a counter. Nothing of it joins the conflict set: who
    is in the tree at the moment of its removal was there before.
    """
    if not unpack_counter(await txn.get(keys.REMOVED_COUNT_KEY, snapshot=True)):
        return
    at: Inode | None = directory
    while at is not None and at.id not in (ROOT_INODE, TRASH_INODE):
        value = await txn.get(keys.inode_key(at.parent), snapshot=True) if at.parent else None
        at = None if value is None else schema.INODE.decode(value)
    if at is None:
        raise EmberfsError(Code.NOT_FOUND, f"directory {directory.id} was removed")


def store_inode(txn: Transaction, inode: Inode) -> None:
    """Write an inode."""
    txn.set(keys.inode_key(inode.id), schema.INODE.encode(inode))


async def find_entry(txn: Transaction, parent: InodeId, name: bytes) -> schema.Entry | None:
    """Return what a name leads to, None if it is free."""
    value = await txn.get(keys.entry_key(parent, name))
    return None if value is None else schema.ENTRY.decode(value)


async def load_entry(txn: Transaction, parent: InodeId, name: bytes) -> schema.Entry:
    """Return what a name leads to or raise NOT_FOUND."""
    entry = await find_entry(txn, parent, name)
    if entry is None:
        raise no_entry(parent, name)
    return entry


def no_entry(parent: InodeId, name: bytes) -> EmberfsError:
    """The error for a name that is not there."""
    return EmberfsError(Code.NOT_FOUND, f"no {name!r} in directory {parent}")


def store_entry(txn: Transaction, parent: InodeId, name: bytes, inode: Inode) -> None:
    """Let a name lead to an inode."""
    entry = schema.Entry(inode.id, inode.mode & 0o170000)
    txn.set(keys.entry_key(parent, name), schema.ENTRY.encode(entry))


def touch_directory(txn: Transaction, directory: Inode, now_ns: int, links: int = 0) -> None:
    """Store a directory whose names changed; `links` subdirectories were added."""
    store_inode(
        txn,
        replace(directory, nlink=directory.nlink + links, mtime_ns=now_ns, ctime_ns=now_ns),
    )


async def is_empty(txn: Transaction, directory: InodeId) -> bool:
    """Tell whether a directory has no names. A name added meanwhile fails the commit."""
    start, stop = keys.entry_span(directory)
    return not await txn.get_range(start, stop, limit=1)


async def has_sessions(txn: Transaction, inode: InodeId) -> bool:
    """Tell whether somebody has the file open. A session added meanwhile fails the commit."""
    start, stop = keys.session_span(inode)
    return bool(await txn.get_range(start, stop, limit=1))


async def add_inode(txn: Transaction, inode: Inode) -> None:
    """Store a new inode. QUOTA if there is one and it is used up."""
    assert await txn.get(keys.inode_key(inode.id)) is None, "an inode id was given twice"
    await quota.charge(txn, inode.quota, quota.amount_of(inode))
    count_inode(txn, inode)


def count_inode(txn: Transaction, inode: Inode) -> None:
    """Store a new inode that is charged to its quota already."""
    txn.add(keys.INODE_COUNT_KEY, 1)
    store_inode(txn, inode)


async def drop_link(txn: Transaction, inode: Inode, now_ns: int) -> None:
    """Take one name from a non-directory. Without names it lives on while it is open."""
    left = replace(inode, nlink=inode.nlink - 1, ctime_ns=now_ns)
    assert left.nlink >= 0
    if left.nlink or await has_sessions(txn, inode.id):
        store_inode(txn, left)
    else:
        await destroy(txn, inode, now_ns)


async def destroy(txn: Transaction, inode: Inode, now_ns: int) -> None:
    """Remove an inode; a file's chunks are left to the collector."""
    txn.clear(keys.inode_key(inode.id))
    txn.add(keys.INODE_COUNT_KEY, -1)
    if inode.quota:
        await quota.charge(txn, inode.quota, quota.amount_of(inode).negative(), forced=True)
        await quota.directory_gone(txn, inode)
    start, stop = keys.xattr_span(inode.id)
    for key, _ in await txn.get_range(start, stop):
        txn.clear(key)
    if inode.inline:
        txn.clear(keys.inline_key(inode.id))
    elif inode.layout is not None:
        trim = await txn.get(keys.trim_key(inode.id))
        cutter = None if trim is None else schema.TRIM.decode(trim).owner
        txn.clear(keys.trim_key(inode.id))
        if inode.layout.data:
            txn.clear(keys.owner_key(inode.layout.data))
        value = schema.DELETED.encode(schema.Deleted(inode.layout, cutter))
        txn.set(keys.deleted_key(now_ns, inode.id), value)
