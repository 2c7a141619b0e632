"""An honest df: what applications can still store, after replication."""

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction, unpack_counter
from emberfs.meta.context import Context
from emberfs.meta.quota import chain_of, usage_of
from emberfs.meta.schema import QuotaState
from emberfs.meta.tree import find_inode
from emberfs.proto.cluster import Chain, RoutingSnapshot
from emberfs.proto.ids import InodeId
from emberfs.proto.meta_calls import (
    Nothing,
    StableRequest,
    StatfsAnswer,
    StatfsRequest,
)


async def statfs(context: Context, request: StatfsRequest) -> StatfsAnswer:
    """Space of all chains, the number of inodes; of a quota, what is left of it."""

    async def work(txn: Transaction) -> int:
        return unpack_counter(await txn.get(keys.INODE_COUNT_KEY))

    inodes = await context.engine.run(work, read_only=True)
    snapshot = context.routing()
    totals = [chain_space(snapshot, chain) for chain in snapshot.chains.values()]
    whole = StatfsAnswer(
        total_bytes=sum(total for total, _ in totals),
        free_bytes=sum(free for _, free in totals),
        inodes=inodes,
    )
    if not request.inode:
        return whole

    async def narrow(txn: Transaction) -> StatfsAnswer:
        return await narrowed(txn, request.inode, whole)

    return await context.engine.run(narrow, read_only=True)


async def narrowed(txn: Transaction, number: InodeId, whole: StatfsAnswer) -> StatfsAnswer:
    """Return the space of what an inode counts for: the quota with the least room counts."""
    inode = await find_inode(txn, number)
    answer = whole
    for held in await chain_of(txn, inode.quota) if inode is not None else ():
        if held.quota.state == QuotaState.REMOVING:
            continue
        used = await usage_of(txn, held.id)
        left = max(0, held.quota.bytes_max - used.bytes)
        if held.quota.bytes_max and (answer is whole or left < answer.free_bytes):
            free = min(left, whole.free_bytes)
            answer = replace(answer, total_bytes=held.quota.bytes_max, free_bytes=free)
        more = max(0, held.quota.files_max - used.files)
        if held.quota.files_max and (
            not answer.inodes_max or more < answer.inodes_max - answer.inodes
        ):
            answer = replace(answer, inodes=used.files, inodes_max=held.quota.files_max)
    return answer


def chain_space(snapshot: RoutingSnapshot, chain: Chain) -> tuple[int, int]:
    """Return (total, free) bytes of a chain: as much as its smallest writable member has.

    Every replica holds every byte, so the fullest one is the limit.
    """
    members = chain.writable() or chain.targets
    reports = [
        snapshot.targets[member.target].report
        for member in members
        if member.target in snapshot.targets
    ]
    if not reports:
        return 0, 0
    total = min(report.capacity_bytes for report in reports)
    free = min(max(0, report.capacity_bytes - report.used_bytes) for report in reports)
    return total, min(total, free)


async def stable(context: Context, request: StableRequest) -> Nothing:
    """Make every metadata transaction so far stable."""
    await context.engine.sync()
    return Nothing()
