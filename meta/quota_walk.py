"""Counting what is in a directory anew, in the background, after its quota was set or removed.

A walk goes down from the directory: every batch of names is one transaction that gives the inodes
the quota of the directory they are in, moves the counters, and notes how far it came. A directory
gets its new quota before its names are gone through, and whoever makes or moves a name reads the
directory's quota in the same transaction: what is there before is found by the walk, what comes
later counts right by itself. So the counters are exact when no directory is left; a walk survives
the server, and several servers may work on it.

A quota that is being removed goes when nothing counts for it any more. What no walk finds (files
without a name that are still open, things in the trash) is looked for among all inodes at the end.
"""

import logging

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.meta import schema
from emberfs.meta.backlog import PAUSE_NS, Backlog
from emberfs.meta.metrics import QUOTA_WALKS
from emberfs.meta.quota import (
    WALKED,
    amount_of,
    begin_walk,
    find_quota,
    has_own_quota,
    move_charge,
    recounted,
    store_quota,
    usage_of,
)
from emberfs.meta.schema import QuotaState
from emberfs.meta.tree import find_inode, store_inode
from emberfs.proto.files import Inode
from emberfs.proto.ids import InodeId
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.meta.quota_walk")

BATCH_NAMES = 64
SCAN_INODES = 512


class QuotaWalks(Backlog):
    """Works through what is to be counted anew."""

    what = "quota walks"

    def __init__(self, env: Env, engine: Engine) -> None:
        super().__init__(env)
        self._engine = engine

    async def step(self) -> bool:
        """Go through one batch of names. False if nothing is left to do."""
        found = await self._first()
        QUOTA_WALKS.set(int(found is not None))
        if found is None:
            return False
        key, value = found
        quota, directory = keys.unpack_walk_key(key)
        if schema.WALK.decode(value).search:
            await self._search(InodeId(quota), key)
            return True

        async def work(txn: Transaction) -> None:
            await _batch(txn, key, InodeId(quota), InodeId(directory))

        await self._engine.run(work)
        return True

    async def _first(self) -> tuple[bytes, bytes] | None:
        async def find(txn: Transaction) -> tuple[bytes, bytes] | None:
            span = keys.span_of(keys.Prefix.WALK.value)
            rows = await txn.get_range(*span, limit=1)
            return rows[0] if rows else None

        return await self._engine.run(find, read_only=True)

    async def _search(self, quota: InodeId, key: bytes) -> None:
        """Look among all inodes for those that still count for a removed quota."""
        start, stop = keys.span_of(keys.Prefix.INODE.value)

        async def page(txn: Transaction) -> tuple[list[InodeId], bytes]:
            rows = await txn.get_range(start, stop, limit=SCAN_INODES)
            found = [schema.INODE.decode(value) for _, value in rows]
            after = rows[-1][0] + b"\0" if len(rows) == SCAN_INODES else stop
            return [inode.id for inode in found if inode.quota == quota], after

        while start < stop:
            left, start = await self._engine.run(page, read_only=True)
            for number in left:
                await self._hand_over(quota, number)
            await self._env.sleep_ns(PAUSE_NS)

        async def drop(txn: Transaction) -> None:
            value, record = await txn.get(key), await find_quota(txn, quota)
            if value is None or not schema.WALK.decode(value).search:
                return  # the quota was set again meanwhile
            txn.clear(key)
            if record is not None and record.state == QuotaState.REMOVING:
                await _drop_if_unused(txn, quota)

        await self._engine.run(drop)

    async def _hand_over(self, quota: InodeId, number: InodeId) -> None:
        async def work(txn: Transaction) -> None:
            inode, record = await find_inode(txn, number), await find_quota(txn, quota)
            if inode is None or record is None or inode.quota != quota:
                return
            if record.state == QuotaState.REMOVING:
                await move_charge(txn, quota, record.above, amount_of(inode), forced=True)
                store_inode(txn, replace(inode, quota=record.above))

        await self._engine.run(work)


async def _batch(txn: Transaction, key: bytes, quota: InodeId, directory: InodeId) -> None:
    """Go on in one directory."""
    value = await txn.get(key)
    if value is None:
        return  # another server has done it, or the quota was changed again
    walk = schema.WALK.decode(value)
    place = await find_inode(txn, directory)
    if place is None or not place.is_directory():
        await _directory_done(txn, key, quota)
        return
    rows = await txn.get_range(*keys.entry_span(directory, walk.after), limit=BATCH_NAMES)
    for _, entry in rows:
        inode = await find_inode(txn, schema.ENTRY.decode(entry).inode)
        if inode is not None:
            await _count_anew(txn, quota, inode, place)
    if quota and rows:
        txn.add(keys.usage_key(quota, WALKED), len(rows))
    if len(rows) < BATCH_NAMES:
        await _directory_done(txn, key, quota)
    else:
        txn.set(key, schema.WALK.encode(schema.Walk(keys.entry_name(rows[-1][0]))))


async def _directory_done(txn: Transaction, key: bytes, quota: InodeId) -> None:
    """After the last directory the counters are exact."""
    txn.clear(key)
    record = await find_quota(txn, quota) if quota else None
    if record is None or await txn.get_range(*keys.walk_span(quota), limit=1):
        return
    if record.state == QuotaState.COUNTING:
        store_quota(txn, quota, replace(record, state=QuotaState.ACTIVE))
    elif record.state == QuotaState.REMOVING and not await _drop_if_unused(txn, quota):
        txn.set(keys.walk_key(quota, quota), schema.WALK.encode(schema.Walk(search=True)))


async def _count_anew(txn: Transaction, quota: InodeId, inode: Inode, place: Inode) -> None:
    """A file with names under two quotas counts for the one that was set last.

    Directories are gone into whatever they count for: an earlier walk may have got no further.
    """
    if has_own_quota(inode):
        await recounted(txn, inode, place)
        return
    if inode.is_directory():
        begin_walk(txn, quota, inode.id)
    if inode.quota != place.quota:
        await move_charge(txn, inode.quota, place.quota, amount_of(inode), forced=True)
        store_inode(txn, replace(inode, quota=place.quota))


async def _drop_if_unused(txn: Transaction, quota: InodeId) -> bool:
    if await usage_of(txn, quota) != (0, 0):
        return False
    txn.clear(keys.quota_key(quota))
    start, stop = keys.usage_span(quota)
    for key, _ in await txn.get_range(start, stop):
        txn.clear(key)
    return True
