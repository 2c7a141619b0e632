"""Turns submission entries into reads and writes of open files, and their results into completions.

Every entry is checked by itself: a bad one fails alone. Errors are negative errno:
EINVAL (no such operation or memory), EBADF (no such file), EACCES (not opened for that),
EREMOTEIO (a server that fell silent may still write to this region: register new memory), and what
a read or write of the file would say.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from emberfs.client import metrics
from emberfs.client.chunkio import ChunkIO
from emberfs.client.manyio import Range, Result, read_commonly, write_many
from emberfs.client.native import layout
from emberfs.client.native.batch import BulkReads, Tell
from emberfs.client.native.holdings import Holdings, errno_of
from emberfs.client.native.layout import COMPLETION, SUBMISSION, Submission, count_of
from emberfs.client.openfile import OpenFile
from emberfs.fabric.region import Slice
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import InodeId

_OFFSET_MAX = 1 << 63


@dataclass(slots=True)
class _Wanted:
    """Reads, or writes, of one batch."""

    user_data: list[int] = field(default_factory=list)
    ranges: list[Range] = field(default_factory=list)

    def at(self, place: int) -> tuple[int, Range]:
        """User data and range of one."""
        return self.user_data[place], self.ranges[place]

    def completions(self, results: Sequence[Result]) -> bytes:
        """Tell what became of each."""
        every = zip(self.user_data, self.ranges, results, strict=True)
        return b"".join([_completion(*one) for one in every])


class Performer:
    """Performs batches for all applications of a daemon."""

    def __init__(
        self, chunkio: ChunkIO, written: Callable[[set[InodeId]], Awaitable[None]]
    ) -> None:
        """`written` drops what the kernel has cached of files, before their writes are told."""
        self._chunkio = chunkio
        self._written = written
        self._bulk = BulkReads(chunkio.packed)

    async def perform(self, entries: bytes, holdings: Holdings, tell: Tell) -> None:
        """Perform entries in any order and tell of each once. Never raises EmberfsError."""
        metrics.RING_ENTRIES.inc(count_of(entries))
        left = await self._bulk.read(entries, holdings, tell)
        if left:
            await self._perform_singly(_unpacked(entries, left), holdings, tell)

    async def _perform_singly(
        self, entries: Sequence[Submission], holdings: Holdings, tell: Tell
    ) -> None:
        reads, writes, refused = _admitted(entries, holdings)
        if refused:
            tell(refused)
        works: list[Coroutine[Any, Any, None]] = []
        if reads.ranges:
            works.append(self._read(reads, tell))
        if writes.ranges:
            works.append(self._write(writes, tell))
        if len(works) == 1:
            await works[0]
        else:
            await asyncio.gather(*works)

    async def _read(self, wanted: _Wanted, tell: Tell) -> None:
        tell(wanted.completions(await read_commonly(self._chunkio, wanted.ranges)))

    async def _write(self, wanted: _Wanted, tell: Tell) -> None:
        """Tell of writes as they end, at once of all that have ended meanwhile."""
        ended: list[tuple[int, Result]] = []
        news = asyncio.Event()

        def note(place: int, result: Result) -> None:
            ended.append((place, result))
            news.set()

        async def pass_on() -> None:
            left = len(wanted.ranges)
            while left:
                await news.wait()
                news.clear()
                some = [(*wanted.at(place), result) for place, result in ended]
                ended.clear()
                left -= len(some)
                await self._written({one.file.inode_id for _, one, _ in some})
                tell(b"".join([_completion(*one) for one in some]))

        passing = asyncio.ensure_future(pass_on())
        try:
            await write_many(wanted.ranges, note)
            await passing
        finally:
            passing.cancel()


def _unpacked(entries: bytes, places: Sequence[int]) -> list[Submission]:
    return [SUBMISSION.unpack_from(entries, place * SUBMISSION.size) for place in places]


def _admitted(entries: Sequence[Submission], holdings: Holdings) -> tuple[_Wanted, _Wanted, bytes]:
    """Sort entries into reads, writes, and those that are refused."""
    reads, writes = _Wanted(), _Wanted()
    refused: list[bytes] = []
    rights: dict[tuple[int, int], OpenFile | int] = {}  # by file and operation: or the errno
    make = tuple.__new__  # a third of what the constructor of a NamedTuple costs
    for user_data, operation, number, offset, region_number, length, start, flags in entries:
        region = holdings.region(region_number)
        if region is None or start + length > region.size_bytes or offset >= _OFFSET_MAX:
            refused.append(COMPLETION.pack(user_data, -errno.EINVAL))
            continue
        if not 0 < length <= layout.ENTRY_BYTES_MAX or operation > layout.WRITE or flags:
            refused.append(COMPLETION.pack(user_data, -errno.EINVAL))
            continue
        file = rights.get((number, operation))
        if file is None:
            file = rights[number, operation] = _allowed(holdings, number, operation)
        if isinstance(file, int):
            refused.append(COMPLETION.pack(user_data, -file))
            continue
        wanted = reads if operation == layout.READ else writes
        wanted.user_data.append(user_data)
        wanted.ranges.append(make(Range, (file, offset, make(Slice, (region, start, length)))))
    return reads, writes, b"".join(refused)


def _allowed(holdings: Holdings, number: int, operation: int) -> OpenFile | int:
    """The open file of a number, or the errno why it cannot be read or written."""
    held = holdings.file(number)
    if held is None:
        return errno.EBADF
    if not (held.read if operation == layout.READ else held.write):
        return errno.EACCES
    try:
        return holdings.opened(held)
    except EmberfsError as problem:
        return errno_of(problem)


def _completion(user_data: int, wanted: Range, result: Result) -> bytes:
    if isinstance(result, EmberfsError):
        memory = wanted.memory
        abandoned = isinstance(memory, Slice) and memory.region.abandoned
        result = -(errno.EREMOTEIO if abandoned else errno_of(result))
    return COMPLETION.pack(user_data, result)
