"""rename(2) and its flags: all overwrite rules, and no directory below itself."""

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta.context import Context
from emberfs.meta.permission import EXECUTE, WRITE, check_name, require, require_removable
from emberfs.meta.quota import placed
from emberfs.meta.tree import (
    destroy,
    drop_link,
    find_entry,
    is_empty,
    load_directory,
    load_entry,
    load_inode,
    no_entry,
    store_entry,
    store_inode,
    touch_directory,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import ROOT_INODE, InodeId
from emberfs.proto.meta_calls import RENAME, Nothing, RenameRequest

NOREPLACE = 1
EXCHANGE = 2


async def rename(context: Context, request: RenameRequest) -> Nothing:
    """Move a name, replacing what is there, or exchange two names."""
    _check(request)

    async def work(txn: Transaction) -> Nothing:
        old = await load_directory(txn, request.parent, request.caller, EXECUTE)
        new = await load_directory(txn, request.new_parent, request.caller, EXECUTE)
        source_entry = await load_entry(txn, old.id, request.name)
        source = await load_inode(txn, source_entry.inode)
        target = await _target(txn, request)
        if target is not None and target.id == source.id:
            return Nothing()  # two names of one file: rename(2) does nothing
        move = _Move(txn, request, old, new, source, target)
        move.check_permission()
        await move.check_loops()
        if request.flags & EXCHANGE:
            await move.exchange(context.env.wall_ns())
        else:
            await move.replace(context.env.wall_ns())
        return Nothing()

    answer = await context.replies.run(RENAME, request.request, work)
    context.collector.wake()
    return answer


def _check(request: RenameRequest) -> None:
    check_name(request.name)
    check_name(request.new_name)
    if {request.name, request.new_name} & {b".", b".."}:
        raise EmberfsError(Code.INVALID, '"." and ".." cannot be renamed')
    if request.flags not in (0, NOREPLACE, EXCHANGE):
        raise EmberfsError(Code.INVALID, f"rename flags {request.flags} are not supported")


async def _target(txn: Transaction, request: RenameRequest) -> Inode | None:
    entry = await find_entry(txn, request.new_parent, request.new_name)
    if entry is None:
        if request.flags & EXCHANGE:
            raise no_entry(request.new_parent, request.new_name)
        return None
    if request.flags & NOREPLACE:
        raise EmberfsError(Code.EXISTS, f"{request.new_name!r} exists")
    return await load_inode(txn, entry.inode)


class _Move:
    """One rename inside its transaction."""

    def __init__(
        self,
        txn: Transaction,
        request: RenameRequest,
        old: Inode,
        new: Inode,
        source: Inode,
        target: Inode | None,
    ) -> None:
        self._txn = txn
        self._request = request
        self._old = old
        self._new = new
        self._source = source
        self._target = target
        self._across = old.id != new.id

    def check_permission(self) -> None:
        """Write permission on both directories, the sticky rule, and on a directory that moves."""
        caller = self._request.caller
        require_removable(self._old, self._source, caller)
        require(self._new, caller, WRITE)
        if self._target is not None:
            require_removable(self._new, self._target, caller)
        moving = [self._source]
        if self._request.flags & EXCHANGE and self._target is not None:
            moving.append(self._target)
        for inode in moving:
            if self._across and inode.is_directory():
                require(inode, caller, WRITE)  # its ".." changes

    async def check_loops(self) -> None:
        """A directory must not become its own descendant; the ancestors join the conflict set."""
        if not self._across:
            return
        if self._source.is_directory():
            await self._refuse_ancestor(self._source.id, self._new)
        exchanging = self._request.flags & EXCHANGE
        if exchanging and self._target is not None and self._target.is_directory():
            await self._refuse_ancestor(self._target.id, self._old)

    async def _refuse_ancestor(self, moving: InodeId, below: Inode) -> None:
        at = below
        while at.id != moving:
            if at.id == ROOT_INODE:
                return
            at = await load_inode(self._txn, at.parent)
        raise EmberfsError(Code.INVALID, f"directory {moving} cannot move below itself")

    async def replace(self, now_ns: int) -> None:
        """Put the source in place of the target, if there is one."""
        source, target = self._source, self._target
        if target is not None:
            await self._check_overwrite(source, target)
        self._txn.clear(keys.entry_key(self._old.id, self._request.name))
        moved = int(source.is_directory())
        replaced = 0
        if target is not None and target.is_directory():
            await destroy(self._txn, target, now_ns)
            replaced = 1
        elif target is not None:
            await drop_link(self._txn, target, now_ns)
        await self._place(source, self._new, self._request.new_name, now_ns)
        self._touch(-moved, moved - replaced, now_ns)

    async def _check_overwrite(self, source: Inode, target: Inode) -> None:
        if source.is_directory() and not target.is_directory():
            raise EmberfsError(Code.NOT_DIRECTORY, "a directory cannot replace a file")
        if target.is_directory() and not source.is_directory():
            raise EmberfsError(Code.IS_DIRECTORY, "a file cannot replace a directory")
        if target.is_directory() and not await is_empty(self._txn, target.id):
            raise EmberfsError(Code.NOT_EMPTY, f"directory {target.id} is not empty")

    async def exchange(self, now_ns: int) -> None:
        """Swap two names."""
        source, target = self._source, self._target
        assert target is not None
        await self._place(source, self._new, self._request.new_name, now_ns)
        await self._place(target, self._old, self._request.name, now_ns)
        gained = int(source.is_directory()) - int(target.is_directory())
        self._touch(-gained, gained, now_ns)

    async def _place(self, inode: Inode, directory: Inode, name: bytes, now_ns: int) -> None:
        txn, parent = self._txn, inode.parent
        empty = False
        if inode.is_directory():
            parent = directory.id
            empty = inode.quota != directory.quota and await is_empty(txn, inode.id)
        inode = await placed(txn, inode, directory, is_empty=empty)
        store_inode(txn, replace(inode, parent=parent, ctime_ns=now_ns))
        store_entry(self._txn, directory.id, name, inode)

    def _touch(self, old_links: int, new_links: int, now_ns: int) -> None:
        if self._across:
            touch_directory(self._txn, self._old, now_ns, links=old_links)
            touch_directory(self._txn, self._new, now_ns, links=new_links)
        else:
            touch_directory(self._txn, self._old, now_ns, links=old_links + new_links)
