"""The common read, of which there are hundreds in a batch: in bulk, not one by one.

Reads come as submission entries (layout.py). Compiled code (_batch.c) tells the sound ones, plans
one packed call per storage service for those that storage alone can answer, and makes completions
of the answers. Every other entry, and what fails, is left to who looks at them one by one.
"""

import asyncio
import struct
from array import array
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

from emberfs.client.chunkread import clear
from emberfs.client.native import _batch
from emberfs.client.native.layout import COMPLETION, SUBMISSION
from emberfs.client.openfile import OpenFile
from emberfs.client.packedread import BYTES_MAX, PackedReader
from emberfs.client.rangelock import Hold
from emberfs.fabric.call import Reply
from emberfs.fabric.region import Region
from emberfs.fabric.sinks import PackedSinks
from emberfs.proto.files import chunks_of

Tell: TypeAlias = Callable[[bytes], None]  # packed completions

_FILE = struct.Struct("<QQQQ")  # inode, what names its chunks, bytes of a chunk, where it ends


class Owner(Protocol):
    """Who has named the files and the memory of a batch's entries by numbers."""

    region_facts: dict[int, bytes]  # by number: id among all regions of this process, and size

    def region(self, number: int) -> Region | None:
        """Look memory up."""
        ...

    def readable(self, number: int) -> OpenFile | None:
        """An open file that may be read by this owner."""
        ...


class _Call(NamedTuple):
    """A planned call, as _batch.plan has it."""

    node: int
    operations: bytes
    sinks: bytes
    places: bytes  # of its entries in the batch, packed u32
    length: int  # bytes of all sinks
    regions: list[int]


class BulkReads:
    """Performs the plain reads of batches."""

    def __init__(self, packed: PackedReader) -> None:
        self._packed = packed

    async def read(self, entries: bytes, owner: Owner, tell: Tell) -> list[int]:
        """Read what is plain, tell of it as it comes; return the places of what is left."""
        facts = owner.region_facts
        states, spans = _batch.survey(entries, facts)
        files, opened, holds = self._files(spans, owner)
        try:
            calls, others = _batch.plan(
                entries,
                states,
                facts,
                files,
                self._packed.costs(),
                BYTES_MAX,
                self._packed.next_turn(),
            )
            batch = _Batch(entries, owner, opened, tell, memoryview(others).cast("I").tolist())
            await batch.perform([_Call(*call) for call in calls], self._packed)
        finally:
            for file, hold in holds:
                file.state.lock.give(hold)
        return batch.left

    def _files(
        self, spans: list[tuple[int, int, int]], owner: Owner
    ) -> tuple[dict[int, tuple[bytes, bytes]], list[OpenFile], list[tuple[OpenFile, Hold]]]:
        """The files that can be read plainly, held where no writer is in the way."""
        files: dict[int, tuple[bytes, bytes]] = {}
        holds: list[tuple[OpenFile, Hold]] = []
        for number, start, stop in spans:
            file = owner.readable(number)
            if file is None or not file.reads_plainly():
                continue
            if (hold := file.state.lock.try_hold(start, stop)) is None:
                continue
            holds.append((file, hold))
            inode, where = file.inode_id, file.state.layout
            facts = _FILE.pack(inode, chunks_of(inode, where), where.chunk_bytes, file.state.length)
            files[number] = facts, self._packed.table(where)
        return files, [file for file, _ in holds], holds


class _Batch:
    """The calls of one batch, which tell of their entries as they end."""

    def __init__(
        self,
        entries: bytes,
        owner: Owner,
        opened: list[OpenFile],
        tell: Tell,
        left: list[int],
    ) -> None:
        self.left = left
        self._entries = entries
        self._owner = owner
        self._opened = opened
        self._tell = tell
        self._running = 0
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def perform(self, calls: list[_Call], packed: PackedReader) -> None:
        """Return when all calls have ended and nothing touches their memory any more."""
        begun = []
        for call in calls:
            regions = [r for n in call.regions if (r := self._owner.region(n)) is not None]
            if len(regions) != len(call.regions):
                self.left += memoryview(call.places).cast("I")
                continue
            sinks = PackedSinks(call.sinks, call.length, regions)
            self._running += 1
            begun.append(
                packed.start(call.node, call.operations, sinks, partial(self._ended, call))
            )
        if not begun:
            return
        try:
            await self._finished
        except asyncio.CancelledError:
            for _, give_up in begun:
                give_up()
            await asyncio.wait([future for future, _ in begun])
            raise

    def _ended(self, call: _Call, reply: Reply | None) -> None:
        try:
            self._settle(call, reply)
        finally:
            self._running -= 1
            if not self._running and not self._finished.done():
                self._finished.set_result(None)

    def _settle(self, call: _Call, reply: Reply | None) -> None:
        """Tell of what a call has read; what failed is left."""
        # A file that was collected meanwhile reads as zeros: then it is to say so.
        if reply is None or not all(file.is_there() for file in self._opened):
            self.left += memoryview(call.places).cast("I")
            return
        filled = array("I", reply.filled).tobytes()
        try:
            done, shorts, failed = _batch.settle(self._entries, call.places, reply.body, filled)
        except ValueError:  # not as many results as operations
            self.left += memoryview(call.places).cast("I")
            return
        if shorts:
            ends = memoryview(shorts).cast("I").tolist()
            done += _ended_early(self._entries, ends, self._owner)
        if done:
            self._tell(done)
        self.left += memoryview(failed).cast("I")


def _ended_early(entries: bytes, shorts: list[int], owner: Owner) -> bytes:
    """Complete what ends before its sink does: the rest are zeros, of a hole."""
    done = []
    for place, count in zip(shorts[::2], shorts[1::2], strict=True):
        entry = SUBMISSION.unpack_from(entries, place * SUBMISSION.size)
        user_data, _, _, _, number, length, start, _ = entry
        region: Region | None = owner.region(number)
        if region is not None and region.fd >= 0:  # else nobody looks at it any more
            clear(region.view[start + count : start + length])
        done.append(COMPLETION.pack(user_data, length))
    return b"".join(done)
