"""Quotas as administrators see them: set, remove, show, list."""

import stat

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction, unpack_counter
from emberfs.meta import schema
from emberfs.meta.context import Context
from emberfs.meta.quota import (
    WALKED,
    Held,
    amount_of,
    begin_walk,
    chain_of,
    find_quota,
    has_own_quota,
    move_charge,
    store_quota,
    usage_of,
)
from emberfs.meta.schema import QuotaState
from emberfs.meta.tree import find_inode, load_inode, store_inode
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import ROOT_INODE, InodeId
from emberfs.proto.meta_calls import Caller, Nothing
from emberfs.proto.quota_calls import (
    REMOVE_QUOTA,
    SET_QUOTA,
    ListQuotasRequest,
    QuotaReport,
    QuotasAnswer,
    RemoveQuotaRequest,
    SetQuotaRequest,
    ShowQuotaRequest,
)

PAGE_QUOTAS = 50
NAME_ROWS = 1000
WAITING_MAX = 100_000  # directories that a report counts


async def set_quota(context: Context, request: SetQuotaRequest) -> Nothing:
    """Set or change the limits of a directory."""

    async def work(txn: Transaction) -> Nothing:
        inode = await load_inode(txn, request.inode)
        await _require_administrator(txn, request.caller)
        if not inode.is_directory():
            raise EmberfsError(Code.NOT_DIRECTORY, f"inode {inode.id} is not a directory")
        record = await find_quota(txn, inode.id)
        if record is None:
            record = await _begin(txn, inode)
        elif record.state == QuotaState.REMOVING:
            record = await _begin_again(txn, inode, record)
        for field in ("bytes_max", "files_max"):
            limit = getattr(request, field)
            if limit is not None:
                record = replace(record, **{field: limit})
        store_quota(txn, inode.id, record)
        return Nothing()

    answer = await context.replies.run(SET_QUOTA, request.request, work, durable=True)
    context.quota_walks.wake()
    return answer


async def _begin(txn: Transaction, inode: Inode) -> schema.Quota:
    """The directory counts for its own quota from now on; what is in it follows."""
    record = schema.Quota(inode.quota, state=QuotaState.COUNTING)
    await _take_over(txn, inode, record)
    return record


async def _begin_again(txn: Transaction, inode: Inode, record: schema.Quota) -> schema.Quota:
    """It was about to be removed."""
    record = replace(record, bytes_max=0, files_max=0, state=QuotaState.COUNTING)
    await _take_over(txn, inode, record)
    return record


async def _take_over(txn: Transaction, inode: Inode, record: schema.Quota) -> None:
    store_quota(txn, inode.id, record)
    await move_charge(txn, inode.quota, inode.id, amount_of(inode), forced=True)
    store_inode(txn, replace(inode, quota=inode.id))
    _walk_anew(txn, inode.id)


def _walk_anew(txn: Transaction, quota: InodeId) -> None:
    txn.clear_range(*keys.walk_span(quota))
    txn.clear(keys.usage_key(quota, WALKED))
    begin_walk(txn, quota, quota)


async def remove_quota(context: Context, request: RemoveQuotaRequest) -> Nothing:
    """Lift the limits at once; what counts for it is handed to the quota above."""

    async def work(txn: Transaction) -> Nothing:
        inode = await load_inode(txn, request.inode)
        await _require_administrator(txn, request.caller)
        record = await find_quota(txn, inode.id)
        if record is None or not has_own_quota(inode):
            raise EmberfsError(Code.NOT_FOUND, f"directory {inode.id} has no quota")
        store_quota(txn, inode.id, replace(record, state=QuotaState.REMOVING))
        await move_charge(txn, inode.id, record.above, amount_of(inode), forced=True)
        store_inode(txn, replace(inode, quota=record.above))
        _walk_anew(txn, inode.id)
        return Nothing()

    answer = await context.replies.run(REMOVE_QUOTA, request.request, work, durable=True)
    context.quota_walks.wake()
    return answer


async def _require_administrator(txn: Transaction, caller: Caller) -> None:
    root = await load_inode(txn, ROOT_INODE)
    if caller.uid not in (0, root.uid):
        raise EmberfsError(
            Code.NOT_PERMITTED,
            f"quotas are set by uid 0 and by uid {root.uid}, who owns the root directory",
        )


# ---------------------------------------------------------------- questions


async def show_quota(context: Context, request: ShowQuotaRequest) -> QuotasAnswer:
    """The quotas that an inode counts for."""

    async def work(txn: Transaction) -> QuotasAnswer:
        inode = await load_inode(txn, request.inode)
        held = await chain_of(txn, inode.quota)
        return QuotasAnswer(tuple([await _report(txn, one) for one in held]))

    return await context.engine.run(work, read_only=True)


async def list_quotas(context: Context, request: ListQuotasRequest) -> QuotasAnswer:
    """A page of all quotas, those that are being removed too."""
    start = keys.quota_key(request.after) + b"\0"
    stop = keys.span_of(keys.Prefix.QUOTA.value).stop

    async def work(txn: Transaction) -> QuotasAnswer:
        await _require_administrator(txn, request.caller)
        rows = await txn.get_range(start, stop, limit=PAGE_QUOTAS + 1)
        held = [
            Held(InodeId(keys.unpack_inode_suffix(key)), schema.QUOTA.decode(value))
            for key, value in rows[:PAGE_QUOTAS]
        ]
        reports = tuple([await _report(txn, one) for one in held])
        return QuotasAnswer(reports, len(rows) > PAGE_QUOTAS)

    return await context.engine.run(work, read_only=True)


async def _report(txn: Transaction, held: Held) -> QuotaReport:
    used = await usage_of(txn, held.id)
    waiting = 0
    if held.quota.state != QuotaState.ACTIVE:
        waiting = len(await txn.get_range(*keys.walk_span(held.id), limit=WAITING_MAX))
    return QuotaReport(
        directory=held.id,
        path=await path_of(txn, held.id),
        bytes_max=held.quota.bytes_max,
        files_max=held.quota.files_max,
        bytes_used=used.bytes,
        files_used=used.files,
        state=held.quota.state.name.lower(),
        walked=unpack_counter(await txn.get(keys.usage_key(held.id, WALKED))),
        waiting=waiting,
    )


async def path_of(txn: Transaction, directory: InodeId) -> bytes:
    """Return the path of a directory, b"" if it has none. Reads the directories above it."""
    names: list[bytes] = []
    at = directory
    while at != ROOT_INODE:
        inode = await find_inode(txn, at)
        name = await _name_in(txn, inode.parent, at) if inode is not None else b""
        if inode is None or not name:
            return b""
        names.append(name)
        at = inode.parent
    return b"/" + b"/".join(reversed(names))


async def _name_in(txn: Transaction, parent: InodeId, directory: InodeId) -> bytes:
    after, more = b"", True
    while more:
        rows = await txn.get_range(*keys.entry_span(parent, after), limit=NAME_ROWS)
        for key, value in rows:
            entry = schema.ENTRY.decode(value)
            if entry.inode == directory and stat.S_ISDIR(entry.mode):
                return keys.entry_name(key)
        more = len(rows) == NAME_ROWS
        after = keys.entry_name(rows[-1][0]) if rows else b""
    return b""
