"""Calls that take a whole tree out of the name space: removal, and the trash.

What is in the trash has a name in a hidden directory, so that all rules for names hold there too;
a record tells where it was. It goes on counting for the quota that it counted for. After a time it
is removed as a tree is.

Rights are those of `rm -r`: uid 0 has them. For anybody else the directories of the tree are looked
at first: to empty one takes reading, writing and searching it, and in a sticky one owning it or
what is in it.
"""

import logging
import stat

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta import schema
from emberfs.meta.context import Context
from emberfs.meta.metrics import TRASH_EXPIRED
from emberfs.meta.namespace import check_removable_name
from emberfs.meta.permission import (
    EXECUTE,
    READ,
    WRITE,
    require,
    require_removable,
)
from emberfs.meta.quota import recounted
from emberfs.meta.removed_trees import hide
from emberfs.meta.tree import (
    add_inode,
    drop_link,
    find_entry,
    find_inode,
    load_directory,
    load_entry,
    load_inode,
    store_entry,
    store_inode,
    touch_directory,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import ROOT_INODE, SECOND, TRASH_INODE, InodeId
from emberfs.proto.meta_calls import Caller, Nothing, RequestId
from emberfs.proto.quota_calls import (
    EMPTY_TRASH,
    REMOVE_TREE,
    RESTORE,
    TRASH,
    EmptyTrashRequest,
    ListTrashRequest,
    RemoveTreeRequest,
    RestoreRequest,
    TrashAnswer,
    TrashItem,
    TrashRequest,
)

log = logging.getLogger("emberfs.meta.tree_calls")

CHECK_NAMES_MAX = 100_000  # of one call of an ordinary user
CHECK_ROWS = 1000
LIST_ROWS = 500
EXPIRE_ROWS = 64
EXPIRE_NS = 30 * SECOND


# ---------------------------------------------------------------- removal


async def remove_tree(context: Context, request: RemoveTreeRequest) -> Nothing:
    """Remove a directory with everything below it."""
    check_removable_name(request.name)
    await _check_rights(context, request.request, request.caller, request.parent, request.name)

    async def work(txn: Transaction) -> Nothing:
        now_ns = context.env.wall_ns()
        parent, victim = await _taken_out(txn, request, now_ns)
        if not victim.is_directory():
            raise EmberfsError(Code.NOT_DIRECTORY, f"inode {victim.id} is not a directory")
        touch_directory(txn, parent, now_ns, links=-1)
        hide(txn, victim, request.caller.uid, now_ns)
        return Nothing()

    answer = await context.replies.run(REMOVE_TREE, request.request, work)
    context.removed_trees.wake()
    return answer


async def _taken_out(
    txn: Transaction, request: RemoveTreeRequest | TrashRequest, now_ns: int
) -> tuple[Inode, Inode]:
    """Take a name away; returns its directory, not stored yet, and what it led to."""
    parent = await load_directory(txn, request.parent, request.caller, EXECUTE)
    entry = await load_entry(txn, parent.id, request.name)
    victim = await load_inode(txn, entry.inode)
    require_removable(parent, victim, request.caller)
    txn.clear(keys.entry_key(parent.id, request.name))
    return parent, victim


async def _check_rights(
    context: Context, request: RequestId, caller: Caller, parent: InodeId, name: bytes
) -> None:
    """Raise what would stop the caller's `rm -r` below a name.

    What others put there between this look and the removal goes as well.
    """
    if caller.uid == 0:
        return

    async def find(txn: Transaction) -> InodeId | None:
        if await context.replies.is_known(txn, request):
            return None  # it is done; only the answer was lost
        directory = await load_directory(txn, parent, caller, EXECUTE)
        entry = await load_entry(txn, directory.id, name)
        return entry.inode if stat.S_ISDIR(entry.mode) else None

    top = await context.engine.run(find, read_only=True)
    waiting = [top] if top is not None else []
    names = 0
    while waiting:
        number, after, more = waiting.pop(), b"", True
        while more:
            found, inner, after, more = await _look(context, caller, number, after)
            waiting += inner
            names += found
            if names > CHECK_NAMES_MAX:
                raise EmberfsError(
                    Code.TOO_MANY_NAMES,
                    f"more than {CHECK_NAMES_MAX} names to check for uid {caller.uid}; "
                    "remove the tree in parts",
                )
            await context.env.sleep_ns(0)


async def _look(
    context: Context, caller: Caller, number: InodeId, after: bytes
) -> tuple[int, list[InodeId], bytes, bool]:
    """Check a page of a directory; returns (names, subdirectories, last name, whether more)."""

    async def work(txn: Transaction) -> tuple[int, list[InodeId], bytes, bool]:
        directory = await find_inode(txn, number)
        rows = await txn.get_range(*keys.entry_span(number, after), limit=CHECK_ROWS)
        if directory is None or not rows:
            return 0, [], b"", False
        require(directory, caller, READ | WRITE | EXECUTE)
        entries = [schema.ENTRY.decode(value) for _, value in rows]
        if directory.mode & stat.S_ISVTX and caller.uid != directory.uid:
            for entry in entries:
                victim = await find_inode(txn, entry.inode)
                if victim is not None:
                    require_removable(directory, victim, caller)
        inner = [entry.inode for entry in entries if stat.S_ISDIR(entry.mode)]
        return len(rows), inner, keys.entry_name(rows[-1][0]), len(rows) == CHECK_ROWS

    return await context.engine.run(work, read_only=True)


# ---------------------------------------------------------------- trash


async def trash(context: Context, request: TrashRequest) -> Nothing:
    """Put a name into the trash."""
    check_removable_name(request.name)
    await _check_rights(context, request.request, request.caller, request.parent, request.name)

    async def work(txn: Transaction) -> Nothing:
        now_ns = context.env.wall_ns()
        parent, victim = await _taken_out(txn, request, now_ns)
        links = int(victim.is_directory())
        if victim.is_directory():
            require(victim, request.caller, WRITE)  # its ".." changes
        touch_directory(txn, parent, now_ns, links=-links)
        place = await _trash_directory(txn, now_ns)
        key = keys.trash_key(now_ns, victim.id)
        if await txn.get(key) is not None:
            raise EmberfsError(Code.CONFLICT, "two names of a file at one moment")
        record = schema.Trashed(
            request.caller.uid, parent.id, request.name, request.path, stat.S_IFMT(victim.mode)
        )
        txn.set(key, schema.TRASHED.encode(record))
        moved = replace(victim, parent=place.id if links else victim.parent, ctime_ns=now_ns)
        store_inode(txn, moved)
        store_entry(txn, place.id, trash_name(key), moved)
        touch_directory(txn, place, now_ns, links=links)
        return Nothing()

    return await context.replies.run(TRASH, request.request, work)


def trash_name(key: bytes) -> bytes:
    """Return the name of something in the directory of the trash, from its record's key."""
    return b"%d-%d" % (keys.unpack_time_suffix(key), keys.unpack_inode_suffix(key))


async def _trash_directory(txn: Transaction, now_ns: int) -> Inode:
    found = await find_inode(txn, TRASH_INODE)
    if found is not None:
        return found
    made = Inode(
        id=TRASH_INODE,
        mode=stat.S_IFDIR | 0o700,
        uid=0,
        gid=0,
        nlink=2,
        length=0,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        parent=TRASH_INODE,
    )
    await add_inode(txn, made)
    return made


async def list_trash(context: Context, request: ListTrashRequest) -> TrashAnswer:
    """A page of what the caller has in the trash."""
    start = keys.trash_key(request.after_ns, request.after) + b"\0"
    stop = keys.span_of(keys.Prefix.TRASH.value).stop

    async def work(txn: Transaction) -> TrashAnswer:
        rows = await txn.get_range(start, stop, limit=LIST_ROWS)
        items = []
        for key, value in rows:
            record = schema.TRASHED.decode(value)
            if request.caller.uid in (0, record.uid):
                number, time_ns = keys.unpack_inode_suffix(key), keys.unpack_time_suffix(key)
                item = TrashItem(
                    InodeId(number), time_ns, record.uid, record.path or record.name, record.mode
                )
                items.append(item)
        if len(rows) < LIST_ROWS:
            return TrashAnswer(tuple(items))
        last = rows[-1][0]
        return TrashAnswer(
            tuple(items), True, keys.unpack_time_suffix(last), keys.unpack_inode_suffix(last)
        )

    return await context.engine.run(work, read_only=True)


async def restore(context: Context, request: RestoreRequest) -> Nothing:
    """Put something back where it was."""

    async def work(txn: Transaction) -> Nothing:
        now_ns = context.env.wall_ns()
        record, inode = await _taken_from_trash(txn, request, now_ns)
        parent = await _old_place(txn, request.caller, record)
        if await find_entry(txn, parent.id, record.name) is not None:
            raise EmberfsError(Code.EXISTS, f"{record.path!r} exists: rename it first")
        require(parent, request.caller, WRITE)
        links = int(inode.is_directory())
        back = await recounted(txn, inode, parent)
        back = replace(back, parent=parent.id if links else back.parent, ctime_ns=now_ns)
        store_inode(txn, back)
        store_entry(txn, parent.id, record.name, back)
        touch_directory(txn, parent, now_ns, links=links)
        return Nothing()

    answer = await context.replies.run(RESTORE, request.request, work)
    context.quota_walks.wake()
    return answer


async def _old_place(txn: Transaction, caller: Caller, record: schema.Trashed) -> Inode:
    """Return the directory that something was in; NOT_FOUND if it is gone, or in the trash too."""
    at = await find_inode(txn, record.parent)
    while at is not None and at.id != ROOT_INODE:
        at = None if at.parent == at.id else await find_inode(txn, at.parent)
    if at is None:
        raise EmberfsError(
            Code.NOT_FOUND,
            f"the directory of {record.path!r} was removed: restore or make it first",
        )
    return await load_directory(txn, record.parent, caller, EXECUTE)


async def _taken_from_trash(
    txn: Transaction, request: RestoreRequest | EmptyTrashRequest, now_ns: int
) -> tuple[schema.Trashed, Inode]:
    """Take something out of the trash; its inode is left as it is."""
    key = keys.trash_key(request.time_ns, request.id)
    value = await txn.get(key)
    inode = await find_inode(txn, request.id)
    if value is None or inode is None:
        raise EmberfsError(Code.NOT_FOUND, f"inode {request.id} is not in the trash (any more)")
    record = schema.TRASHED.decode(value)
    if request.caller.uid not in (0, record.uid):
        raise EmberfsError(
            Code.NOT_PERMITTED, f"uid {record.uid} has put inode {request.id} into the trash"
        )
    txn.clear(key)
    txn.clear(keys.entry_key(TRASH_INODE, trash_name(key)))
    place = await load_inode(txn, TRASH_INODE)
    touch_directory(txn, place, now_ns, links=-int(inode.is_directory()))
    return record, inode


async def empty_trash(context: Context, request: EmptyTrashRequest) -> Nothing:
    """Remove something from the trash for good."""

    async def work(txn: Transaction) -> Nothing:
        await _emptied(txn, request, context.env.wall_ns())
        return Nothing()

    answer = await context.replies.run(EMPTY_TRASH, request.request, work)
    context.removed_trees.wake()
    context.collector.wake()
    return answer


async def _emptied(txn: Transaction, request: EmptyTrashRequest, now_ns: int) -> None:
    record, inode = await _taken_from_trash(txn, request, now_ns)
    if inode.is_directory():
        hide(txn, inode, record.uid, now_ns)
    else:
        await drop_link(txn, inode, now_ns)


# ---------------------------------------------------------------- age


async def expire(context: Context) -> int:
    """Remove from the trash what has been there for too long; returns how many things."""
    age_ns, gone = context.policy.trash_age_ns, 0
    start = keys.span_of(keys.Prefix.TRASH.value).start
    root = Caller(0, 0)

    async def oldest(txn: Transaction) -> list[bytes]:
        stop = keys.trash_key(max(0, context.env.wall_ns() - age_ns), 0)
        return [key for key, _ in await txn.get_range(start, stop, limit=EXPIRE_ROWS)]

    while age_ns and (found := await context.engine.run(oldest, read_only=True)):
        for key in found:
            time_ns, number = keys.unpack_time_suffix(key), keys.unpack_inode_suffix(key)
            request = EmptyTrashRequest(root, RequestId(0, 0), time_ns, InodeId(number))

            async def work(txn: Transaction, request: EmptyTrashRequest = request) -> None:
                await _emptied(txn, request, context.env.wall_ns())

            try:
                await context.engine.run(work)
                gone += 1
                TRASH_EXPIRED.inc()
            except EmberfsError as problem:
                if problem.code != Code.NOT_FOUND:  # else somebody was faster
                    raise
        context.removed_trees.wake()
        context.collector.wake()
    return gone


async def live(context: Context) -> None:
    """Expire for ever."""
    while True:
        try:
            await expire(context)
        except EmberfsError as problem:
            log.warning("emptying the trash: %s", problem)
        await context.env.sleep_ns(EXPIRE_NS)
