"""Repairs of quotas; see mend.py."""

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta import schema
from emberfs.meta.context import Context
from emberfs.meta.quota import (
    amount_of,
    begin_walk,
    find_quota,
    has_own_quota,
    move_charge,
    recounted,
    store_quota,
)
from emberfs.meta.quota_census import set_usage
from emberfs.meta.schema import QuotaState
from emberfs.meta.tree import find_entry, load_inode, store_inode
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.meta_calls import Mend


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise EmberfsError(Code.STALE, f"{what} has changed since it was looked at; look again")


async def correct_usage(txn: Transaction, context: Context, wanted: Mend) -> None:
    """The counters become what was counted."""
    await set_usage(txn, context, wanted.inode)


async def recount(txn: Transaction, context: Context, wanted: Mend) -> None:
    """An inode counts for the quota of the directory that it is in; what is below it follows."""
    value = await txn.get(keys.inode_key(wanted.inode))
    _require(value == wanted.expected, f"inode {wanted.inode}")
    inode = schema.INODE.decode(wanted.expected)
    entry = await find_entry(txn, wanted.parent, wanted.name)
    _require(entry is not None and entry.inode == inode.id, f"{wanted.name!r}")
    parent = await load_inode(txn, wanted.parent)
    if has_own_quota(inode) and await find_quota(txn, inode.id) is None:
        # Its limits are lost. It is removed as any other, so that nothing names it any more.
        lost = schema.Quota(parent.quota, state=QuotaState.REMOVING)
        store_quota(txn, inode.id, lost)
        begin_walk(txn, inode.id, inode.id)
        await move_charge(txn, inode.id, parent.quota, amount_of(inode), forced=True)
        store_inode(txn, replace(inode, quota=parent.quota))
    else:
        store_inode(txn, await recounted(txn, inode, parent))


async def drop_quota(txn: Transaction, context: Context, wanted: Mend) -> None:
    """A quota that limits nothing goes, when nothing counts for it."""
    value = await txn.get(keys.quota_key(wanted.inode))
    _require(value == wanted.expected, f"the quota of directory {wanted.inode}")
    record = schema.QUOTA.decode(wanted.expected)
    store_quota(txn, wanted.inode, replace(record, state=QuotaState.REMOVING))
    begin_walk(txn, wanted.inode, wanted.inode)
