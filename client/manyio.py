"""Reads and writes of many ranges of open files at once: one call per storage service and batch.

Each range has a result of its own: the bytes, or why not. The promises are those of one read or
write (description.py). Ranges that storage alone can answer share their calls; what this client
holds itself, whose length meta must tell, or where a writer is at work, takes the common way.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeAlias

from emberfs.client.chunkio import ChunkIO, ReadRequest
from emberfs.client.description import OpenFile
from emberfs.client.filestate import FileState
from emberfs.client.native._entries import pack, settle
from emberfs.client.native.batch import BulkReads
from emberfs.client.native.layout import READ, SUBMISSION, region_facts
from emberfs.fabric.region import Buffer, Region, Slice, length_of
from emberfs.proto.errors import EmberfsError

Result: TypeAlias = int | EmberfsError  # bytes, short at the end of the file; or why not

BULK_MIN = 2  # ranges; a lone one may share its call with others (combine.py)
IN_FLIGHT_MAX = 64  # single reads or writes of one call at a time


class Range(NamedTuple):
    """Bytes of an open file, and the memory that they go to or come from."""

    file: OpenFile
    offset: int  # bytes in the file
    memory: Buffer


async def read_many(chunkio: ChunkIO, ranges: Sequence[Range]) -> list[Result]:
    """Fill the memory of every range; results in their order. Never raises EmberfsError.

    Hundreds of small reads cost least where their memory is parts of a Region.
    """
    if len(ranges) < BULK_MIN or not all(type(one.memory) is Slice for one in ranges):
        return await read_commonly(chunkio, ranges)
    owner = _Owner(ranges)
    entries, refused = pack(list(ranges), owner.parts, owner.numbers, READ, 0)
    left = await BulkReads(chunkio.packed).read(entries, owner, owner.tell)
    left = [SUBMISSION.unpack_from(entries, place * SUBMISSION.size)[0] for place in left]
    if left or refused:
        left += refused
        found = await read_commonly(chunkio, [ranges[place] for place in left])
        for place, result in zip(left, found, strict=True):
            owner.results[place] = result
    return owner.results


class _Owner:
    """Files and memory of some ranges, by numbers, and the results (see batch.Owner)."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self.results: list[Result] = [0] * len(ranges)
        self.parts = [one.memory for one in ranges if isinstance(one.memory, Slice)]
        self._files = {file.number: file for file in {one.file for one in ranges}}
        self._regions = {part.region.id: part.region for part in self.parts}
        self.numbers = {number: number for number in self._regions}
        self.region_facts = {
            number: region_facts(number, region.size_bytes)
            for number, region in self._regions.items()
        }

    def region(self, number: int) -> Region | None:
        """Look memory up."""
        return self._regions.get(number)

    def readable(self, number: int) -> OpenFile | None:
        """Every file that is named."""
        return self._files[number]

    def tell(self, completions: bytes) -> None:
        """Note results."""
        settle(completions, {0: self})


async def read_commonly(chunkio: ChunkIO, ranges: Sequence[Range]) -> list[Result]:
    """As read_many, by a loop that looks at every range."""
    results: list[Result] = [0] * len(ranges)
    plain, others = _plain(ranges)
    singly = [_read_one(ranges, place, results) for place in others]
    if plain:
        singly.append(_read_together(chunkio, ranges, plain, results))
    if len(singly) == 1:
        await singly[0]
    elif singly:
        await _in_turns(singly)
    return results


async def write_many(
    ranges: Sequence[Range], ended: Callable[[int, Result], None] = lambda place, result: None
) -> list[Result]:
    """Write the memory of every range, past the buffers: done means committed by every chain.

    Ranges of one call that overlap are written in any order. `ended` hears of each as it ends.
    """
    results: list[Result] = [0] * len(ranges)

    async def write(place: int) -> None:
        await _write_one(ranges, place, results)
        ended(place, results[place])

    await _in_turns([write(place) for place in range(len(ranges))])
    return results


async def _in_turns(works: Sequence[Awaitable[None]]) -> None:
    turn = asyncio.Semaphore(IN_FLIGHT_MAX)

    async def take(work: Awaitable[None]) -> None:
        async with turn:
            await work

    await asyncio.gather(*map(take, works))


def _plain(ranges: Sequence[Range]) -> tuple[list[int], list[int]]:
    """Places of the ranges that storage alone can answer, and of the others."""
    plain: list[int] = []
    others: list[int] = []
    ends: dict[OpenFile, int] = {}  # how far a file can be read without a question
    for place, (file, offset, memory) in enumerate(ranges):
        end = ends.get(file)
        if end is None:
            end = ends[file] = file.state.length if file.reads_plainly() else -1
        length = length_of(memory)
        if offset >= 0 and offset + length <= end and length:
            plain.append(place)
        else:
            others.append(place)
    return plain, others


async def _read_one(ranges: Sequence[Range], place: int, results: list[Result]) -> None:
    file, offset, memory = ranges[place]
    try:
        results[place] = await file.read_into(offset, memory)
    except EmberfsError as problem:
        results[place] = problem


async def _write_one(ranges: Sequence[Range], place: int, results: list[Result]) -> None:
    file, offset, memory = ranges[place]
    try:
        results[place] = await file.write(offset, memory, direct=True)
    except EmberfsError as problem:
        results[place] = problem


async def _read_together(
    chunkio: ChunkIO, ranges: Sequence[Range], places: Sequence[int], results: list[Result]
) -> None:
    """Read what has no writer in the way in common calls, the rest one by one.

    Nothing has been awaited since the ranges were found plain.
    """
    held = _Held(ranges, places)
    requests: list[ReadRequest] = []
    for place in held.places:
        file, offset, memory = ranges[place]
        requests.append((file.inode_id, file.state.layout, offset, memory))
    left = held.busy
    try:
        if requests:
            await chunkio.read_many(requests)
            await _still_there(ranges, held.places)
            for place in held.places:
                results[place] = length_of(ranges[place].memory)
    except EmberfsError:
        left = list(places)  # one of them failed: each is to tell for itself
    finally:
        held.give()
    if left:
        await _in_turns([_read_one(ranges, place, results) for place in left])


async def _still_there(ranges: Sequence[Range], places: Sequence[int]) -> None:
    """Raise STALE if a file has been collected meanwhile: its chunks read as zeros."""
    for file in {ranges[place].file for place in places}:
        await file.check_there()


class _Held:
    """Shared locks, one per file from the first range to the last, where they are free at once."""

    def __init__(self, ranges: Sequence[Range], places: Sequence[int]) -> None:
        spans: dict[FileState, tuple[int, int]] = {}
        for place in places:
            file, offset, memory = ranges[place]
            stop = offset + length_of(memory)
            start, end = spans.get(file.state, (offset, stop))
            spans[file.state] = (min(start, offset), max(end, stop))
        self._holds = {
            state: hold
            for state, (start, stop) in spans.items()
            if (hold := state.lock.try_hold(start, stop)) is not None
        }
        self.places = [place for place in places if ranges[place].file.state in self._holds]
        self.busy = [place for place in places if ranges[place].file.state not in self._holds]

    def give(self) -> None:
        """End them."""
        for state, hold in self._holds.items():
            state.lock.give(hold)
