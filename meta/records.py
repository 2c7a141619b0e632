"""Stored records as they are, for fsck: pages, single records, and a count of one moment."""

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction, unpack_counter
from emberfs.meta.context import Context
from emberfs.proto.ids import MiB
from emberfs.proto.meta_calls import (
    CensusAnswer,
    CensusRequest,
    FetchRecordsAnswer,
    FetchRecordsRequest,
    RecordRow,
    ScanRecordsAnswer,
    ScanRecordsRequest,
)

SCAN_ROWS_MAX = 4096
PAGE_BYTES_MAX = 2 * MiB  # of an answer; one row may go beyond it
COUNT_ROWS = 2048


async def scan(context: Context, request: ScanRecordsRequest) -> ScanRecordsAnswer:
    """Answer a page of records in key order; it ends early when it gets long."""
    limit = min(max(1, request.limit), SCAN_ROWS_MAX)

    async def work(txn: Transaction) -> ScanRecordsAnswer:
        found = await txn.get_range(request.start, request.stop, limit=limit + 1)
        rows: list[RecordRow] = []
        size = 0
        for key, value in found[:limit]:
            rows.append(RecordRow(key, value if request.values else b""))
            size += len(key) + len(rows[-1].value)
            if size > PAGE_BYTES_MAX:
                break
        return ScanRecordsAnswer(tuple(rows), len(rows) < len(found))

    return await context.engine.run(work, read_only=True)


async def fetch(context: Context, request: FetchRecordsRequest) -> FetchRecordsAnswer:
    """Answer records by key."""

    async def work(txn: Transaction) -> FetchRecordsAnswer:
        return FetchRecordsAnswer(tuple(await txn.get_many(request.keys)))

    return await context.engine.run(work, read_only=True)


async def count_inodes(context: Context, txn: Transaction) -> int:
    """Count the inodes that the transaction sees, letting callers in between the pages."""
    start, stop = keys.span_of(keys.Prefix.INODE.value)
    count = 0
    while True:
        rows = await txn.get_range(start, stop, limit=COUNT_ROWS, snapshot=True)
        count += len(rows)
        if len(rows) < COUNT_ROWS:
            return count
        start = rows[-1][0] + b"\0"
        await context.env.sleep_ns(0)


async def census(context: Context, request: CensusRequest) -> CensusAnswer:
    """Compare the counter of inodes with the inodes of the same moment."""

    async def work(txn: Transaction) -> tuple[int, int]:
        counter = unpack_counter(await txn.get(keys.INODE_COUNT_KEY))
        return await count_inodes(context, txn), counter

    inodes, counter = await context.engine.run(work, read_only=True)
    return CensusAnswer(inodes, counter, tuple(context.overdue()))
