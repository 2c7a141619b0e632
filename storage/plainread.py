"""The common read, of which there are hundreds in a batch: looked up here, read in one call.

Plain is what reads whole grains of the committed version, with no redo data over it, from a file
with a descriptor. All else takes the long way (ChunkStore.read_into).
"""

from typing import NamedTuple

from emberfs.proto.ids import ChunkId
from emberfs.storage.blocks import BlockFiles
from emberfs.storage.records import CHECKSUM_BYTES, ChunkRecord, grain_of
from emberfs.storage.table import ChunkTable

_PLANS_MAX = 1 << 16


class Plan(NamedTuple):
    """How a committed version is read."""

    record: ChunkRecord
    fd: int
    start: int  # of its block, in the file
    grain: int  # bytes that a checksum covers


class PlainReads:
    """Looks up plain reads of one chunk store.

    Invariant: a plan counts as long as its record is the one that the table has.
    """

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

    def look(
        self, chunk: ChunkId, offset: int, length: int
    ) -> tuple[int, int, bytes, int, int, int] | None:
        """Descriptor, place, checksums, first byte of them, grain; and version. None: not plain."""
        _, record = self._table.cached(chunk)
        if record is None:
            return None
        plan = self._plans.get(chunk)
        if plan is None or plan.record is not record:
            plan = self._planned(chunk, record)
        _, fd, start, grain = plan
        stop = offset + length
        if fd < 0 or not length or offset % grain or stop > record.length:
            return None
        if (stop % grain and stop != record.length) or record.block in self._table.redo:
            return None
        first = offset // grain * CHECKSUM_BYTES
        return fd, start + offset, record.checksums, first, grain, record.version

    def _planned(self, chunk: ChunkId, record: ChunkRecord) -> Plan:
        if len(self._plans) >= _PLANS_MAX:
            self._plans.clear()
        fd, start = self._files.descriptor(record.block) if record.length else (-1, 0)
        plan = self._plans[chunk] = Plan(record, fd, start, grain_of(record.length))
        return plan
