"""Names: make, link, remove, list. Each handler is one transaction."""

import stat
from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta import acl, schema
from emberfs.meta.context import Context
from emberfs.meta.permission import (
    EXECUTE,
    READ,
    WRITE,
    check_name,
    created_owner,
    require,
    require_mutable,
    require_removable,
)
from emberfs.meta.quota import check_link
from emberfs.meta.tree import (
    add_inode,
    destroy,
    drop_link,
    find_entry,
    is_empty,
    load_directory,
    load_entry,
    load_inode,
    store_entry,
    store_inode,
    touch_directory,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import LINK_COUNT_MAX, SYMLINK_BYTES_MAX, Inode
from emberfs.proto.ids import InodeId
from emberfs.proto.meta_calls import (
    LINK,
    MKNOD,
    REMOVE,
    SYMLINK,
    Caller,
    GetattrRequest,
    InodeAnswer,
    LinkRequest,
    MknodRequest,
    Nothing,
    ReaddirAnswer,
    ReaddirRequest,
    ReaddirRow,
    RemoveRequest,
    SymlinkRequest,
)

READDIR_ROWS_MAX = 2048

_SPECIAL = (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
_DEVICES = (stat.S_IFCHR, stat.S_IFBLK)

Build = Callable[[Inode], Inode]  # from the parent directory


async def getattr_(context: Context, request: GetattrRequest) -> InodeAnswer:
    """Attributes by id; an unlinked file has them as long as it is open."""

    async def work(txn: Transaction) -> InodeAnswer:
        return InodeAnswer(await load_inode(txn, request.inode))

    return await context.engine.run(work, read_only=True)


def check_new_name(name: bytes) -> None:
    """Refuse names that cannot be made; "." and ".." always exist."""
    check_name(name)
    if name in (b".", b".."):
        raise EmberfsError(Code.EXISTS, f"{name!r} always exists")


def new_inode(
    context: Context,
    inode: InodeId,
    parent: Inode,
    caller: Caller,
    mode: int,
    rdev: int = 0,
    umask: int = 0,
) -> Inode:
    """Return the inode of a file that is about to be made in `parent`."""
    gid, mode = created_owner(parent, caller, mode)
    access = b""
    if stat.S_ISLNK(mode):
        pass  # its mode means nothing
    elif parent.default_acl:
        mode, access = acl.inherited(parent.default_acl, mode)
    else:
        mode &= ~(umask & 0o777)
    now_ns = context.env.wall_ns()
    directory, regular = stat.S_ISDIR(mode), stat.S_ISREG(mode)
    inline = regular and context.policy.inline_bytes_max > 0
    return Inode(
        id=inode,
        mode=mode,
        uid=caller.uid,
        gid=gid,
        nlink=2 if directory else 1,
        length=0,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        rdev=rdev,
        layout=context.new_layout(inode) if regular else None,
        parent=parent.id if directory else InodeId(0),
        quota=parent.quota,
        acl=access,
        default_acl=parent.default_acl if directory else b"",
        inline=inline,
        inline_version=context.versions.after(0) if inline else 0,
    )


async def add_name(
    txn: Transaction, context: Context, parent: Inode, name: bytes, inode: Inode
) -> None:
    """Store a new inode under a new name."""
    await add_inode(txn, inode)
    store_entry(txn, parent.id, name, inode)
    touch_directory(txn, parent, context.env.wall_ns(), links=int(inode.is_directory()))


def _maker(
    context: Context, caller: Caller, parent: InodeId, name: bytes, build: Build
) -> Callable[[Transaction], Awaitable[InodeAnswer]]:
    check_new_name(name)

    async def work(txn: Transaction) -> InodeAnswer:
        directory = await load_directory(txn, parent, caller, EXECUTE)
        if await find_entry(txn, parent, name) is not None:
            raise EmberfsError(Code.EXISTS, f"{name!r} exists in directory {parent}")
        require(directory, caller, WRITE)
        made = build(directory)
        await add_name(txn, context, directory, name, made)
        return InodeAnswer(made)

    return work


async def mknod(context: Context, request: MknodRequest) -> InodeAnswer:
    """Make a directory, fifo, socket, device or empty regular file."""
    mode = stat.S_IMODE(request.mode) | (stat.S_IFMT(request.mode) or stat.S_IFREG)
    kind = stat.S_IFMT(mode)
    if kind not in (stat.S_IFREG, stat.S_IFDIR, *_SPECIAL):
        raise EmberfsError(Code.INVALID, f"mknod cannot make a file of mode {request.mode:o}")
    if kind in _DEVICES and request.caller.uid != 0:
        raise EmberfsError(Code.NOT_PERMITTED, "only uid 0 makes device files")
    rdev = request.rdev if kind in _DEVICES else 0
    inode = await context.ids.take()

    def build(parent: Inode) -> Inode:
        return new_inode(context, inode, parent, request.caller, mode, rdev, request.umask)

    work = _maker(context, request.caller, request.parent, request.name, build)
    return await context.replies.run(MKNOD, request.request, work)


async def symlink(context: Context, request: SymlinkRequest) -> InodeAnswer:
    """Make a symbolic link."""
    if not request.target:
        raise EmberfsError(Code.NOT_FOUND, "a symbolic link needs a target")
    if len(request.target) > SYMLINK_BYTES_MAX:
        raise EmberfsError(
            Code.NAME_TOO_LONG, f"a symbolic link holds at most {SYMLINK_BYTES_MAX} bytes"
        )
    inode = await context.ids.take()

    def build(parent: Inode) -> Inode:
        made = new_inode(context, inode, parent, request.caller, stat.S_IFLNK | 0o777)
        return replace(made, symlink=request.target, length=len(request.target))

    work = _maker(context, request.caller, request.parent, request.name, build)
    return await context.replies.run(SYMLINK, request.request, work)


async def link(context: Context, request: LinkRequest) -> InodeAnswer:
    """Make a hard link to a non-directory."""
    check_new_name(request.name)

    async def work(txn: Transaction) -> InodeAnswer:
        now_ns = context.env.wall_ns()
        directory = await load_directory(txn, request.parent, request.caller, EXECUTE)
        inode = await load_inode(txn, request.inode)
        if await find_entry(txn, request.parent, request.name) is not None:
            raise EmberfsError(Code.EXISTS, f"{request.name!r} exists")
        require(directory, request.caller, WRITE)
        if inode.is_directory():
            raise EmberfsError(Code.NOT_PERMITTED, "a directory cannot have a second name")
        require_mutable(inode)
        if inode.nlink == 0:
            raise EmberfsError(Code.NOT_FOUND, f"inode {inode.id} was removed")
        if inode.nlink >= LINK_COUNT_MAX:
            raise EmberfsError(Code.TOO_MANY_LINKS, f"inode {inode.id} has {inode.nlink} names")
        check_link(inode, directory)
        linked = replace(inode, nlink=inode.nlink + 1, ctime_ns=now_ns)
        store_inode(txn, linked)
        store_entry(txn, directory.id, request.name, linked)
        touch_directory(txn, directory, now_ns)
        return InodeAnswer(linked)

    return await context.replies.run(LINK, request.request, work)


async def remove(context: Context, request: RemoveRequest) -> Nothing:
    """Unlink, or rmdir with `directory`."""
    check_removable_name(request.name)

    async def work(txn: Transaction) -> Nothing:
        now_ns = context.env.wall_ns()
        parent = await load_directory(txn, request.parent, request.caller, EXECUTE)
        entry = await load_entry(txn, parent.id, request.name)
        victim = await load_inode(txn, entry.inode)
        require_removable(parent, victim, request.caller)
        await _check_kind(txn, victim, request.directory)
        txn.clear(keys.entry_key(parent.id, request.name))
        if victim.is_directory():
            await destroy(txn, victim, now_ns)
        else:
            await drop_link(txn, victim, now_ns)
        touch_directory(txn, parent, now_ns, links=-int(victim.is_directory()))
        return Nothing()

    answer = await context.replies.run(REMOVE, request.request, work)
    context.collector.wake()
    return answer


def check_removable_name(name: bytes) -> None:
    """Refuse what cannot be removed: "." and "..", and what is no name."""
    check_name(name)
    if name == b"..":
        raise EmberfsError(Code.NOT_EMPTY, "a parent directory is never empty")
    if name == b".":
        raise EmberfsError(Code.INVALID, 'a directory cannot be removed by its name "."')


async def _check_kind(txn: Transaction, victim: Inode, directory: bool) -> None:
    if not directory and victim.is_directory():
        raise EmberfsError(Code.IS_DIRECTORY, f"inode {victim.id} is a directory: use rmdir")
    if directory and not victim.is_directory():
        raise EmberfsError(Code.NOT_DIRECTORY, f"inode {victim.id} is not a directory")
    if directory and not await is_empty(txn, victim.id):
        raise EmberfsError(Code.NOT_EMPTY, f"directory {victim.id} is not empty")


async def readdir(context: Context, request: ReaddirRequest) -> ReaddirAnswer:
    """List a page of names: one range scan, and one multi-get for the inodes."""
    limit = min(max(1, request.limit), READDIR_ROWS_MAX)

    async def work(txn: Transaction) -> ReaddirAnswer:
        await load_directory(txn, request.inode, request.caller, READ)
        start, stop = keys.entry_span(request.inode, request.after)
        found = await txn.get_range(start, stop, limit=limit + 1)
        entries = [(keys.entry_name(k), schema.ENTRY.decode(v)) for k, v in found[:limit]]
        inodes: list[Inode | None] = [None] * len(entries)
        if request.plus:
            values = await txn.get_many([keys.inode_key(entry.inode) for _, entry in entries])
            inodes = [None if v is None else schema.INODE.decode(v) for v in values]
        rows = tuple(
            ReaddirRow(name, entry.inode, entry.mode, inode)
            for (name, entry), inode in zip(entries, inodes, strict=True)
        )
        return ReaddirAnswer(rows, len(found) > limit)

    return await context.engine.run(work, read_only=True)
