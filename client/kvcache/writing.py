"""Storing blocks: few large writes into the segment, then one append to the log publishes them."""

import asyncio
from collections.abc import Sequence

from emberfs.client.kvcache.call import Call
from emberfs.client.kvcache.ownlog import OwnLog
from emberfs.client.kvcache.reading import checksum_of
from emberfs.client.kvcache.records import KEYS_MAX, FileId, Put
from emberfs.client.kvcache.segments import Filling, Segments
from emberfs.client.kvcache.slots import RUN_BYTES_MAX
from emberfs.client.kvcache.staging import Staging
from emberfs.client.kvcache.view import View


class _Run:
    """Neighbouring blocks that are written together."""

    __slots__ = ("filling", "items", "start", "stop")

    def __init__(self, filling: Filling, start: int) -> None:
        self.filling = filling
        self.start = start  # bytes in the segment
        self.stop = start
        self.items: list[tuple[int, int]] = []  # (position in the call, offset in the segment)


class Writer:
    """Stores blocks in a namespace."""

    def __init__(self, view: View, segments: Segments, own: OwnLog, staging: Staging) -> None:
        self._view = view
        self._segments = segments
        self._own = own
        self._staging = staging

    async def put(self, keys: Sequence[bytes], sources: Sequence[memoryview], call: Call) -> None:
        """Store blocks. Raises OSError when some could not be; the others are stored."""
        for first in range(0, len(keys), KEYS_MAX):
            part = range(first, min(first + KEYS_MAX, len(keys)))
            placed = await self._segments.place([len(sources[n]) for n in part])
            try:
                runs = _runs_of(part, placed, sources)
                works = (self._write(run, keys, sources) for run in runs)
                done = await asyncio.gather(*works, return_exceptions=True)
                await self._publish(keys, sources, runs, done, call)
            finally:
                self._segments.release(placed)

    async def _write(
        self, run: _Run, keys: Sequence[bytes], sources: Sequence[memoryview]
    ) -> list[int]:
        """Write neighbours in one go; returns their checksums.

        The checksum is of what is sent, should the caller change his buffer meanwhile.
        """
        filling, start = run.filling, run.start
        buffer, view = self._staging.lend(run.stop - start)
        checksums: list[int] = []
        end = 0
        for position, offset in run.items:
            source, at = sources[position], offset - start
            view[end:at] = bytes(at - end)
            end = at + len(source)
            view[at:end] = source
            checksums.append(checksum_of(keys[position], filling.id, offset, view[at:end]))
        await filling.file.pwrite(buffer, start)
        return checksums

    async def _publish(
        self,
        keys: Sequence[bytes],
        sources: Sequence[memoryview],
        runs: Sequence[_Run],
        done: Sequence[list[int] | BaseException],
        call: Call,
    ) -> None:
        columns: dict[FileId, tuple[list[int], list[int], list[int]]] = {}
        problem: BaseException | None = None
        for run, checksums in zip(runs, done, strict=True):
            if isinstance(checksums, BaseException):
                problem = checksums
                continue
            positions, offsets, sums = columns.setdefault(run.filling.id, ([], [], []))
            positions += [position for position, _ in run.items]
            offsets += [offset for _, offset in run.items]
            sums += checksums
        puts = [
            Put(segment, [keys[n] for n in where], offsets, [len(sources[n]) for n in where], sums)
            for segment, (where, offsets, sums) in columns.items()
        ]
        await self._own.append(puts)
        call.reached = True
        for segment, (positions, _, _) in columns.items():
            gone = self._view.index.is_dead(segment)
            for position in positions:
                if gone:  # another process had to make room just now
                    call.reasons[position] = "evicted"
                elif not call.over:
                    call.lengths[position] = len(sources[position])
        if problem is not None:
            raise problem


def _runs_of(
    positions: Sequence[int],
    placed: Sequence[tuple[Filling, int]],
    sources: Sequence[memoryview],
) -> list[_Run]:
    """Group what lies behind one another; between are only gaps that nobody else uses."""
    runs: list[_Run] = []
    last: _Run | None = None
    for position, (filling, offset) in zip(positions, placed, strict=True):
        stop = offset + len(sources[position])
        if last is None or last.filling is not filling or stop - last.start > RUN_BYTES_MAX:
            last = _Run(filling, offset)
            runs.append(last)
        last.items.append((position, offset))
        last.stop = stop
    return runs
