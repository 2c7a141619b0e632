"""The common read, of which there are hundreds in a batch: looked up and read in one call.

Plain is what reads whole grains of the committed version, with no redo data over it, from a file
with a descriptor, and finds it in the page cache as its checksums say. All else takes the long way
(reads.py). A Python loop costs several times what the reads of 4 KiB themselves do, so the loop is
compiled (_plainread.c); its twin here is the oracle of the test.
"""

import errno
import os
import struct
from collections.abc import Callable, Container, Mapping
from typing import NamedTuple

from emberfs.fabric.sinks import SinkTable
from emberfs.proto.ids import ChunkId
from emberfs.proto.storage_calls import ReadOp, ReadResult, pack_read_results, unpack_read_ops
from emberfs.runtime.checksum import crc32c_blocks_twin
from emberfs.storage._plainread import read_plainly as _native
from emberfs.storage.blocks import BlockFiles
from emberfs.storage.records import CHECKSUM_BYTES, ChunkRecord, grain_of
from emberfs.storage.table import ChunkTable

_PLANS_MAX = 1 << 16
_PLACE = struct.Struct("<iIIQQ")  # descriptor, grain and length, place of the block, version

# What became of an operation. REFUSED: the target, its version or the sink is not what it says.
DONE, REFUSED, DISPUTED, NOT_PLAIN, NOT_CACHED, DIFFERENT, FAILED = range(7)


class Plan(NamedTuple):
    """How a committed version is read; it counts as long as the table has this very record."""

    record: ChunkRecord
    place: bytes  # packed
    checksums: bytes
    block: int


class Readable(NamedTuple):
    """What may be read of a target, as the compiled loop looks at it."""

    active: Container[ChunkId]  # chunks with operations in work,
    leftover: Container[ChunkId]  # or with a version from before: a read must look closer
    records: Mapping[ChunkId, ChunkRecord | None]  # that are in memory
    plans: Mapping[ChunkId, Plan]
    redo: Container[int]  # blocks with redo data over them
    touch: Callable[[ChunkId], object]  # a record was used
    plan: Callable[[ChunkId], Plan | None]  # make one


Admit = Callable[[int, int], Readable | None]  # by target and chain version


class PlainReads:
    """The part of one chunk store that plain reads need."""

    def __init__(self, table: ChunkTable, files: BlockFiles) -> None:
        self._table = table
        self._files = files
        self._plans: dict[ChunkId, Plan] = {}

    def begin(self) -> int:
        """Before the first look; until `end` no block that was looked at is used anew."""
        return self._table.reader_begins()

    def end(self, token: int) -> None:
        """The reads are over."""
        self._table.reader_ends(token)

    def readable(self, active: Container[ChunkId], leftover: Container[ChunkId]) -> Readable:
        """Name what a batch may read, but for the chunks that are in work."""
        table = self._table
        records = table.records
        return Readable(
            active, leftover, records, self._plans, table.redo, records.move_to_end, self._planned
        )

    def _planned(self, chunk: ChunkId) -> Plan | None:
        _, record = self._table.cached(chunk)
        if record is None:
            return None
        if len(self._plans) >= _PLANS_MAX:
            self._plans.clear()
        fd, start = self._files.descriptor(record.block) if record.length else (-1, 0)
        place = _PLACE.pack(fd, grain_of(record.length), record.length, start, record.version)
        plan = self._plans[chunk] = Plan(record, place, record.checksums, record.block)
        return plan


def read_plainly(operations: memoryview, sinks: SinkTable, admit: Admit) -> tuple[bytes, bytes]:
    """Fill the sinks of packed READ_BATCH operations, as many, where that is plain.

    Returns packed results and one byte for each operation. Only after DONE does its result or the
    content of its sink mean anything. `admit` is asked for a target once in a run of its
    operations. Releases the GIL once for all reads.
    """
    return _native(operations, sinks.descriptors, sinks.regions, sinks.streamed, admit)


def read_plainly_twin(
    operations: memoryview, sinks: SinkTable, admit: Admit
) -> tuple[bytes, bytes]:
    """Do the same in Python."""
    states, results = bytearray(), []
    for operation, sink in zip(unpack_read_ops(operations), sinks.views(), strict=True):
        state, version = _read(operation, sink, admit)
        states.append(state)
        length = operation.length if state == DONE else 0
        results.append(ReadResult(0, length, version if state == DONE else 0))
    return pack_read_results(results), bytes(states)


def _read(operation: ReadOp, sink: memoryview, admit: Admit) -> tuple[int, int]:
    target, chain_version, chunk, offset, length, _ = operation
    if len(sink) != length or (plain := admit(target, chain_version)) is None:
        return REFUSED, 0
    if chunk in plain.active or chunk in plain.leftover:
        return DISPUTED, 0
    record, plan = plain.records.get(chunk), plain.plans.get(chunk)
    if record is None or plan is None or plan.record is not record:
        plan = plain.plan(chunk)
    if plan is None or plan.block in plain.redo:
        return NOT_PLAIN, 0
    fd, grain, whole, start, version = _PLACE.unpack(plan.place)
    stop = offset + length
    if fd < 0 or not length or offset % grain or stop > whole or (stop % grain and stop != whole):
        return NOT_PLAIN, 0
    first = offset // grain * CHECKSUM_BYTES
    return _read_checked(fd, start + offset, plan.checksums[first:], grain, sink), version


def _read_checked(fd: int, offset: int, sums: bytes, grain: int, sink: memoryview) -> int:
    try:
        count = os.preadv(fd, [sink], offset, os.RWF_NOWAIT)
    except OSError as problem:
        return NOT_CACHED if problem.errno in (errno.EAGAIN, errno.EOPNOTSUPP) else FAILED
    if count != len(sink):
        return NOT_CACHED
    found = crc32c_blocks_twin(sink, grain)
    return DONE if found == sums[: len(found)] else DIFFERENT
