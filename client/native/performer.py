"""Turns submission entries into reads and writes of open files, and their results into completions.

Every entry is checked by itself: a bad one fails alone. Errors are negative errno:
EINVAL (no such operation or memory), EBADF (no such file), EACCES (not opened for that),
EREMOTEIO (a server that fell silent may still write to this region: register new memory), and what
a read or write of the file would say.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeAlias

from emberfs.client import metrics
from emberfs.client.chunkio import ChunkIO
from emberfs.client.manyio import Range, Result, read_many, write_many
from emberfs.client.native import layout
from emberfs.client.native.holdings import Holdings, errno_of
from emberfs.client.native.layout import Submission
from emberfs.fabric.region import Slice
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import InodeId

Completion: TypeAlias = tuple[int, int]  # user data, bytes or -errno
Tell: TypeAlias = Callable[[list[Completion]], None]

_OFFSET_MAX = 1 << 63


class Performer:
    """Performs batches for all applications of a daemon."""

    def __init__(
        self, chunkio: ChunkIO, written: Callable[[set[InodeId]], Awaitable[None]]
    ) -> None:
        """`written` drops what the kernel has cached of files, before their writes are told."""
        self._chunkio = chunkio
        self._written = written

    async def perform(self, entries: Sequence[Submission], holdings: Holdings, tell: Tell) -> None:
        """Perform entries in any order and tell of each once. Never raises EmberfsError."""
        reads: list[tuple[int, Range]] = []
        writes: list[tuple[int, Range]] = []
        refused: list[Completion] = []
        for entry in entries:
            found = _admit(entry, holdings)
            if isinstance(found, int):
                refused.append((entry.user_data, -found))
            elif entry.operation == layout.READ:
                reads.append((entry.user_data, found))
            else:
                writes.append((entry.user_data, found))
        if refused:
            tell(refused)
        works: list[Coroutine[Any, Any, None]] = []
        if reads:
            works.append(self._read(reads, tell))
        if writes:
            works.append(self._write(writes, tell))
        if len(works) == 1:
            await works[0]
        else:
            await asyncio.gather(*works)
        metrics.RING_ENTRIES.inc(len(entries))

    async def _read(self, wanted: list[tuple[int, Range]], tell: Tell) -> None:
        results = await read_many(self._chunkio, [one for _, one in wanted])
        tell([_completion(*one, result) for one, result in zip(wanted, results, strict=True)])

    async def _write(self, wanted: list[tuple[int, Range]], tell: Tell) -> None:
        results = await write_many([one for _, one in wanted])
        await self._written({one.file.inode_id for _, one in wanted})
        tell([_completion(*one, result) for one, result in zip(wanted, results, strict=True)])


def _admit(entry: Submission, holdings: Holdings) -> Range | int:
    """What an entry asks for, or the errno why not."""
    region = holdings.region(entry.region)
    stop = entry.region_offset + entry.length
    if region is None or stop > region.size_bytes or not entry.length > 0:
        return errno.EINVAL
    if entry.length > layout.ENTRY_BYTES_MAX or entry.offset >= _OFFSET_MAX or entry.flags:
        return errno.EINVAL
    if entry.operation not in (layout.READ, layout.WRITE):
        return errno.EINVAL
    held = holdings.file(entry.file)
    if held is None:
        return errno.EBADF
    if not (held.read if entry.operation == layout.READ else held.write):
        return errno.EACCES
    try:
        file = holdings.opened(held)
    except EmberfsError as problem:
        return errno_of(problem)
    return Range(file, entry.offset, Slice(region, entry.region_offset, entry.length))


def _completion(user_data: int, wanted: Range, result: Result) -> Completion:
    if isinstance(result, int):
        return user_data, result
    memory = wanted.memory
    if isinstance(memory, Slice) and memory.region.abandoned:
        return user_data, -errno.EREMOTEIO
    return user_data, -errno_of(result)
