"""Reading blocks: neighbours together, through memory of this client, verified before handed out.

After a deadline, or from a server that hangs, bytes may still arrive in the memory that a call
named. So no memory of the caller is ever named to a server: one copy, of what has verified.
"""

import asyncio
import logging
import struct
from collections.abc import Sequence

from emberfs.client.file import File
from emberfs.client.kvcache.call import Call
from emberfs.client.kvcache.index import Location
from emberfs.client.kvcache.records import FileId
from emberfs.client.kvcache.segments import ReadRequest, Segments
from emberfs.client.kvcache.slots import Run, runs_of
from emberfs.client.kvcache.staging import Staging, rounded
from emberfs.client.kvcache.view import View
from emberfs.fabric.region import Slice
from emberfs.proto.ids import MiB
from emberfs.runtime.checksum import crc32c

log = logging.getLogger("emberfs.client.kvcache")

GROUP_BYTES = 32 * MiB  # of memory that one call takes at a time
TAINTED_MAX = 3  # a read begins again when a server may still write into its memory

_PLACE = struct.Struct("<QIQI")


class Reader:
    """Fetches blocks of a namespace."""

    def __init__(self, view: View, segments: Segments, staging: Staging) -> None:
        self._view = view
        self._segments = segments
        self._staging = staging
        self.touched: dict[FileId, None] = {}  # read from, since whoever tells others emptied it

    async def fetch(
        self,
        places: Sequence[tuple[int, Location]],
        keys: Sequence[bytes],
        sinks: Sequence[memoryview],
        call: Call,
    ) -> None:
        """Read blocks, (position in the call, where it is) each, and hand out what verifies."""
        fitting: list[tuple[int, Location]] = []
        for position, place in places:
            if place.length > len(sinks[position]):
                call.reasons[position] = "short_buffer"
            else:
                fitting.append((position, place))
        group: list[Run] = []
        size = 0
        for run in runs_of(fitting):
            taken = rounded(run.stop - run.start)
            if group and size + taken > GROUP_BYTES:
                await self._fetch_runs(group, keys, sinks, call)
                group, size = [], 0
            group.append(run)
            size += taken
        if group:
            await self._fetch_runs(group, keys, sinks, call)

    async def _fetch_runs(
        self,
        runs: Sequence[Run],
        keys: Sequence[bytes],
        sinks: Sequence[memoryview],
        call: Call,
    ) -> None:
        wanted = {run.segment for run in runs}
        opened = await asyncio.gather(
            *(self._segments.file(segment) for segment in wanted), return_exceptions=True
        )
        files: dict[FileId, File] = {}
        reasons: dict[FileId, str] = {}
        for segment, one in zip(wanted, opened, strict=True):
            if isinstance(one, File):
                files[segment] = one
            elif isinstance(one, FileNotFoundError):
                self._view.lost(segment)
                reasons[segment] = "evicted"
            elif isinstance(one, OSError):
                call.failed = True
                reasons[segment] = "failed"
            else:
                raise one
        there = [run for run in runs if run.segment in files]
        for run in runs:
            if run.segment in reasons:
                _mark(run, call, reasons[run.segment])
        filled = await self._fill(there, files)
        for run, view in zip(there, filled, strict=True):
            if view is None:
                call.failed = True
                _mark(run, call, "failed")
                continue
            call.reached = True
            self._deliver(run, view, keys, sinks, call)

    async def _fill(
        self, runs: Sequence[Run], files: dict[FileId, File]
    ) -> list[memoryview | None]:
        """Read runs into memory of our own; None for those that failed."""
        views: list[memoryview | None] = [None] * len(runs)
        waiting = list(range(len(runs)))
        for _ in range(TAINTED_MAX):
            lent = [self._staging.lend(runs[n].stop - runs[n].start) for n in waiting]
            requests: list[ReadRequest] = [
                (files[runs[n].segment], runs[n].start, buffer)
                for n, (buffer, _) in zip(waiting, lent, strict=True)
            ]
            again: list[int] = []
            results = await self._segments.read_all(requests)
            for n, (buffer, view), result in zip(waiting, lent, results, strict=True):
                if not isinstance(result, OSError):
                    views[n] = view[:result]
                elif isinstance(buffer, Slice) and buffer.region.abandoned:
                    again.append(n)
                else:
                    log.info("KV cache: %s", result)
            if not again:
                break
            waiting = again
        return views

    def _deliver(
        self,
        run: Run,
        view: memoryview,
        keys: Sequence[bytes],
        sinks: Sequence[memoryview],
        call: Call,
    ) -> None:
        if call.over:
            return
        for position, place in run.items:
            start = place.offset - run.start
            data = view[start : start + place.length]
            if len(data) < place.length:
                call.reasons[position] = "truncated"
            elif checksum_of(keys[position], run.segment, place.offset, data) != place.checksum:
                call.reasons[position] = "checksum"
            else:
                sinks[position][: place.length] = data
                call.lengths[position] = place.length
        self.touched.pop(run.segment, None)
        self.touched[run.segment] = None
        self._view.index.touch((run.segment,))


def checksum_of(key: bytes, segment: FileId, offset: int, data: memoryview) -> int:
    """Of a block with its key, length and place: bytes of another block never verify."""
    return crc32c(data, crc32c(_PLACE.pack(*segment, offset, len(data)) + key))


def _mark(run: Run, call: Call, reason: str) -> None:
    for position, _ in run.items:
        call.reasons[position] = reason
