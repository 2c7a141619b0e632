"""Inodes, entries and sessions in a transaction: load, store, link, drop."""

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta import schema
from emberfs.meta.permission import require
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import InodeId
from emberfs.proto.meta_calls import Caller


async def find_inode(txn: Transaction, inode: InodeId) -> Inode | None:
    """Return the inode, None if there is none."""
    value = await txn.get(keys.inode_key(inode))
    return None if value is None else schema.INODE.decode(value)


async def load_inode(txn: Transaction, inode: InodeId) -> Inode:
    """Return the inode or raise NOT_FOUND."""
    value = await txn.get(keys.inode_key(inode))
    if value is None:
        raise EmberfsError(Code.NOT_FOUND, f"inode {inode} does not exist (any more)")
    return schema.INODE.decode(value)


async def load_directory(txn: Transaction, inode: InodeId, caller: Caller, want: int) -> Inode:
    """Return a directory that grants `want`; NOT_FOUND, NOT_DIRECTORY, ACCESS."""
    found = await load_inode(txn, inode)
    if not found.is_directory():
        raise EmberfsError(Code.NOT_DIRECTORY, f"inode {inode} is not a directory")
    require(found, caller, want)
    return found


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
    """Store a new inode."""
    assert await txn.get(keys.inode_key(inode.id)) is None, "an inode id was given twice"
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
    start, stop = keys.xattr_span(inode.id)
    for key, _ in await txn.get_range(start, stop):
        txn.clear(key)
    if inode.layout is not None:
        txn.clear(keys.trim_key(inode.id))
    if inode.inline:
        txn.clear(keys.inline_key(inode.id))
    elif inode.layout is not None:
        if inode.layout.data:
            txn.clear(keys.owner_key(inode.layout.data))
        value = schema.DELETED.encode(schema.Deleted(inode.layout))
        txn.set(keys.deleted_key(now_ns, inode.id), value)
