"""Every counter of a quota compared with the inodes of the same moment, for fsck."""

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta import schema
from emberfs.meta.context import Context
from emberfs.meta.quota import (
    BYTES,
    FILES,
    Amount,
    amount_of,
    begin_walk,
    chain_of,
    find_quota,
    usage_of,
)
from emberfs.meta.schema import QuotaState
from emberfs.proto.ids import InodeId
from emberfs.proto.quota_calls import QuotaCensusAnswer, QuotaCensusRequest, QuotaDifference

COUNT_ROWS = 1024


async def census(context: Context, request: QuotaCensusRequest) -> QuotaCensusAnswer:
    """Return the quotas whose counters are not what counts for them."""

    async def work(txn: Transaction) -> QuotaCensusAnswer:
        return QuotaCensusAnswer(tuple(await differences(context, txn)))

    return await context.engine.run(work, read_only=True)


async def differences(context: Context, txn: Transaction) -> list[QuotaDifference]:
    """Count in one snapshot. Depends on nothing: adds meanwhile keep a difference as it is."""
    rows = await txn.get_range(*keys.span_of(keys.Prefix.QUOTA.value), snapshot=True)
    quotas = [InodeId(keys.unpack_inode_suffix(key)) for key, _ in rows]
    if not quotas:
        return []
    counters = {quota: await usage_of(txn, quota, snapshot=True) for quota in quotas}
    truth = dict.fromkeys(quotas, Amount(0, 0))
    for own, amount in (await _by_quota(context, txn)).items():
        for held in await chain_of(txn, own):
            before = truth[held.id]
            truth[held.id] = Amount(before.files + amount.files, before.bytes + amount.bytes)
    return [
        QuotaDifference(
            quota, right.files, counters[quota].files, right.bytes, counters[quota].bytes
        )
        for quota, right in truth.items()
        if right != counters[quota]
    ]


async def _by_quota(context: Context, txn: Transaction) -> dict[InodeId, Amount]:
    """Sum up what counts for each quota itself, letting callers in between the pages."""
    start, stop = keys.span_of(keys.Prefix.INODE.value)
    found: dict[InodeId, Amount] = {}
    while start < stop:
        rows = await txn.get_range(start, stop, limit=COUNT_ROWS, snapshot=True)
        for _, value in rows:
            inode = schema.INODE.decode(value)
            if inode.quota:
                files, total = found.get(inode.quota, Amount(0, 0))
                one = amount_of(inode)
                found[inode.quota] = Amount(files + one.files, total + one.bytes)
        start = rows[-1][0] + b"\0" if len(rows) == COUNT_ROWS else stop
        await context.env.sleep_ns(0)
    return found


async def set_usage(txn: Transaction, context: Context, quota: InodeId) -> None:
    """Correct the counters of a quota by the difference of one moment.

    One that is being removed may have waited for just that.
    """
    record = await find_quota(txn, quota)
    if record is not None and record.state == QuotaState.REMOVING:
        begin_walk(txn, quota, quota)
    for wrong in await differences(context, txn):
        if wrong.directory == quota:
            for kind, more in (
                (FILES, wrong.files - wrong.files_counter),
                (BYTES, wrong.bytes - wrong.bytes_counter),
            ):
                if more:
                    txn.add(keys.usage_key(quota, kind), more)
