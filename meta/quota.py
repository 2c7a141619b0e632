"""What counts for which quota: usage counters that change in the transaction of the change itself.

Every inode names the quota that it counts for (`Inode.quota`): a new one takes that of its
directory, a directory that has a quota names itself. What counts for a quota counts for all that
enclose it. Counters change by atomic adds, which never conflict; before growth they are read. Far
from a limit that read is no part of the transaction either. Near it, it is: then two that would
both just fit cannot both commit.
"""

import stat
from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction, unpack_counter
from emberfs.meta import schema
from emberfs.meta.schema import QuotaState
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import InodeId, MiB

BYTES, FILES, WALKED = b"b", b"f", b"w"
NO_QUOTA = InodeId(0)

# How many changes like this one may be under way at once, unseen by it, without passing a limit.
CHANGES_AT_ONCE = 256
DEPTH_MAX = 4096  # of nested quotas: more than paths can be deep

GRANT_BYTES_MIN = 1 * MiB
GRANT_BYTES_MAX = 64 * MiB
GRANT_SHARE = 8


class Amount(NamedTuple):
    """What counts."""

    files: int
    bytes: int

    def negative(self) -> "Amount":
        """The opposite."""
        return Amount(-self.files, -self.bytes)


class Held(NamedTuple):
    """A quota and the directory that has it."""

    id: InodeId
    quota: schema.Quota


def amount_of(inode: Inode) -> Amount:
    """What an inode counts for: one file, and the length of a regular one."""
    return Amount(1, length_of(inode))


def length_of(inode: Inode) -> int:
    """Bytes that count."""
    return inode.length if stat.S_ISREG(inode.mode) else 0


def has_own_quota(inode: Inode) -> bool:
    """Tell a directory that has a quota itself."""
    return inode.quota == inode.id


# ---------------------------------------------------------------- records


async def find_quota(txn: Transaction, quota: InodeId) -> schema.Quota | None:
    """Return the quota of a directory, None if it has none."""
    value = await txn.get(keys.quota_key(quota))
    return None if value is None else schema.QUOTA.decode(value)


def store_quota(txn: Transaction, quota: InodeId, record: schema.Quota) -> None:
    """Write a quota."""
    txn.set(keys.quota_key(quota), schema.QUOTA.encode(record))


async def chain_of(txn: Transaction, quota: InodeId) -> list[Held]:
    """Return a quota and all that enclose it, innermost first."""
    found: list[Held] = []
    while quota and len(found) < DEPTH_MAX:
        record = await find_quota(txn, quota)
        if record is None:
            break
        found.append(Held(quota, record))
        quota = record.above
    return found


async def usage_of(txn: Transaction, quota: InodeId, *, snapshot: bool = False) -> Amount:
    """Return what counts for a quota. With `snapshot` a later change fails no commit."""
    return Amount(
        unpack_counter(await txn.get(keys.usage_key(quota, FILES), snapshot)),
        unpack_counter(await txn.get(keys.usage_key(quota, BYTES), snapshot)),
    )


# ---------------------------------------------------------------- changes


async def charge(txn: Transaction, quota: InodeId, amount: Amount, *, forced: bool = False) -> None:
    """Let `amount` more count for a quota. QUOTA if it does not fit, unless `forced`."""
    if quota and amount != (0, 0):
        await _add(txn, await chain_of(txn, quota), amount, forced=forced)


async def charge_growth(
    txn: Transaction, inode: Inode, length: int, *, forced: bool = False
) -> None:
    """A regular file gets a new length."""
    await charge(txn, inode.quota, Amount(0, length - inode.length), forced=forced)


async def charge_each(
    txn: Transaction, quota: InodeId, amounts: Sequence[Amount]
) -> list[EmberfsError | None]:
    """Let several amounts count, in their order, as far as they fit; QUOTA in place of the others.

    Together they are charged with one look at each counter.
    """
    total = Amount(sum(one.files for one in amounts), sum(one.bytes for one in amounts))
    refused: list[EmberfsError | None] = [None] * len(amounts)
    if not quota:
        return refused
    chain = await chain_of(txn, quota)
    try:
        await _add(txn, chain, total, forced=False)
    except EmberfsError as problem:
        if problem.code != Code.QUOTA:
            raise
    else:
        return refused
    for place, amount in enumerate(amounts):
        try:
            await _add(txn, chain, amount, forced=False, exact=True)
        except EmberfsError as problem:
            if problem.code != Code.QUOTA:
                raise
            refused[place] = problem
    return refused


async def move_charge(
    txn: Transaction, old: InodeId, new: InodeId, amount: Amount, *, forced: bool = False
) -> None:
    """What counted for `old` counts for `new`; nothing changes for those that enclose both."""
    if old == new:
        return
    before, after = await chain_of(txn, old), await chain_of(txn, new)
    common = {held.id for held in before} & {held.id for held in after}
    gone = [held for held in before if held.id not in common]
    come = [held for held in after if held.id not in common]
    await _add(txn, gone, amount.negative(), forced=True)
    await _add(txn, come, amount, forced=forced)


async def _add(
    txn: Transaction, chain: list[Held], amount: Amount, *, forced: bool, exact: bool = False
) -> None:
    """If one of the chain refuses, nothing has been added to any."""
    for held in () if forced else chain:
        await _check(txn, held, amount, exact=exact)
    for held in chain:
        for kind, count in ((FILES, amount.files), (BYTES, amount.bytes)):
            if count:
                txn.add(keys.usage_key(held.id, kind), count)


async def _check(txn: Transaction, held: Held, amount: Amount, *, exact: bool) -> None:
    quota = held.quota
    if quota.state == QuotaState.REMOVING:
        return
    for kind, more, limit, what in (
        (FILES, amount.files, quota.files_max, "files"),
        (BYTES, amount.bytes, quota.bytes_max, "bytes"),
    ):
        if more <= 0 or not limit:
            continue
        key = keys.usage_key(held.id, kind)
        used = unpack_counter(await txn.get(key, snapshot=True))
        if exact or used + more * CHANGES_AT_ONCE > limit:
            used = unpack_counter(await txn.get(key))
        if used + more > limit:
            raise EmberfsError(
                Code.QUOTA,
                f"the quota of directory {held.id} allows {limit} {what}, {used} are used, "
                f"{more} more do not fit",
            )


# ---------------------------------------------------------------- questions


async def room_bytes(txn: Transaction, quota: InodeId) -> int | None:
    """Return how many bytes still fit, None for no limit; not as of the commit."""
    left: int | None = None
    for held in await chain_of(txn, quota):
        if held.quota.bytes_max and held.quota.state != QuotaState.REMOVING:
            used = unpack_counter(await txn.get(keys.usage_key(held.id, BYTES), snapshot=True))
            free = max(0, held.quota.bytes_max - used)
            left = free if left is None else min(left, free)
    return left


async def grant_bytes(txn: Transaction, inode: Inode, want: int = 0) -> int | None:
    """Return by how much a writer may let a file grow before it asks again; None: no limit.

    A share of what is left, so that a few writers together hardly pass the limit; more if the next
    write alone wants more.
    """
    left = await room_bytes(txn, inode.quota) if inode.quota else None
    if left is None:
        return None
    share = min(max(left // GRANT_SHARE, GRANT_BYTES_MIN), GRANT_BYTES_MAX)
    return min(left, max(share, want))


# ---------------------------------------------------------------- names that move


async def placed(
    txn: Transaction, inode: Inode, directory: Inode, *, is_empty: bool = False
) -> Inode:
    """Return an inode that is given a name in `directory`, counted for the quota that is there.

    OTHER_QUOTA for a directory that is not `is_empty`, and for a file with several names: what is
    below it, or its other names, would count for the old one. QUOTA if it does not fit.
    """
    old, new = inode.quota, directory.quota
    if has_own_quota(inode):
        return await _hung_up(txn, inode, directory)
    if old == new:
        return inode
    if inode.is_directory() and not is_empty:
        changing = await _being_changed(txn, old, new)
        if not changing:
            raise _other_quota(inode, "directory")
        begin_walk(txn, changing, inode.id)
        await move_charge(txn, old, new, amount_of(inode), forced=True)
        return replace(inode, quota=new)
    if not inode.is_directory() and inode.nlink > 1:
        raise _other_quota(inode, "file with several names")
    await move_charge(txn, old, new, amount_of(inode))
    return replace(inode, quota=new)


def check_link(inode: Inode, directory: Inode) -> None:
    """All names of a file lie in directories of one quota: OTHER_QUOTA."""
    if inode.quota != directory.quota:
        raise _other_quota(inode, "second name of a file")


def _other_quota(inode: Inode, what: str) -> EmberfsError:
    text = f"inode {inode.id}: a {what} cannot go where another quota counts; copy it"
    return EmberfsError(Code.OTHER_QUOTA, text)


async def _hung_up(
    txn: Transaction, inode: Inode, directory: Inode, *, forced: bool = False
) -> Inode:
    """A directory with a quota of its own moves as a whole."""
    record = await find_quota(txn, inode.id)
    if record is not None and record.above != directory.quota:
        amount = await usage_of(txn, inode.id)
        await move_charge(txn, record.above, directory.quota, amount, forced=forced)
        store_quota(txn, inode.id, replace(record, above=directory.quota))
    return inode


async def _being_changed(txn: Transaction, old: InodeId, new: InodeId) -> InodeId:
    """Return the quota whose being set or removed has not come to a directory yet, or 0."""
    for inner, outer in ((new, old), (old, new)):
        record = await find_quota(txn, inner) if inner else None
        if record is not None and record.above == outer and record.state != QuotaState.ACTIVE:
            return inner
    return NO_QUOTA


async def recounted(txn: Transaction, inode: Inode, directory: Inode) -> Inode:
    """As `placed`, for names that are put back: always; what is below follows in the background."""
    if has_own_quota(inode):
        return await _hung_up(txn, inode, directory, forced=True)
    if inode.quota == directory.quota:
        return inode
    await move_charge(txn, inode.quota, directory.quota, amount_of(inode), forced=True)
    if inode.is_directory():
        begin_walk(txn, NO_QUOTA, inode.id)
    return replace(inode, quota=directory.quota)


async def directory_gone(txn: Transaction, inode: Inode) -> None:
    """A directory was deleted; files that are still open may count for its quota."""
    record = await find_quota(txn, inode.id) if has_own_quota(inode) else None
    if record is not None:
        store_quota(txn, inode.id, replace(record, state=QuotaState.REMOVING))
        begin_walk(txn, inode.id, inode.id)


def begin_walk(txn: Transaction, quota: InodeId, directory: InodeId) -> None:
    """Whatever is in a directory is to be counted for the directory's own quota.

    `quota` is being set or removed, and waits for it; 0 if nobody waits.
    """
    txn.set(keys.walk_key(quota, directory), schema.WALK.encode(schema.Walk()))
