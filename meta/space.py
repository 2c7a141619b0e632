"""An honest df: what applications can still store, after replication."""

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction, unpack_counter
from emberfs.meta.context import Context
from emberfs.proto.cluster import Chain, RoutingSnapshot
from emberfs.proto.meta_calls import (
    ListenAnswer,
    ListenRequest,
    Nothing,
    StableRequest,
    StatfsAnswer,
    StatfsRequest,
)


async def statfs(context: Context, request: StatfsRequest) -> StatfsAnswer:
    """Space of all chains; the number of inodes is kept by atomic adds."""

    async def work(txn: Transaction) -> int:
        return unpack_counter(await txn.get(keys.INODE_COUNT_KEY))

    inodes = await context.engine.run(work, read_only=True)
    snapshot = context.routing()
    totals = [chain_space(snapshot, chain) for chain in snapshot.chains.values()]
    return StatfsAnswer(
        total_bytes=sum(total for total, _ in totals),
        free_bytes=sum(free for _, free in totals),
        inodes=inodes,
    )


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


async def listen(context: Context, request: ListenRequest) -> ListenAnswer:
    """Wait for changes of names and attributes; see announce.py."""
    return await context.announcer.listen(request)


async def stable(context: Context, request: StableRequest) -> Nothing:
    """Make every metadata transaction so far stable."""
    await context.engine.sync()
    return Nothing()
