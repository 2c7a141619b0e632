"""Segment files: the one that this process fills, those that it reads, and eviction.

A segment belongs to its writer for writing, and to nobody for removal: any process may evict any
segment. Nothing can come of it but misses, because names are never used again and every block is
verified when it is read. Evictions are published before files are removed.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

from emberfs.client.file import File, FileSystem
from emberfs.client.gather import gather_all
from emberfs.client.kvcache import metrics
from emberfs.client.kvcache.ownlog import OwnLog, close_quietly
from emberfs.client.kvcache.records import Evicted, FileId, Opened, Sealed
from emberfs.client.kvcache.slots import Slots, file_name
from emberfs.client.kvcache.snapshot import remove_quietly
from emberfs.client.kvcache.view import View
from emberfs.fabric.region import Buffer
from emberfs.proto.ids import CHUNK_BYTES_DEFAULT
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.client.kvcache")

OPEN_MAX = 1024  # segments open for reading

ReadRequest: TypeAlias = tuple[File, int, Buffer]  # file, offset in bytes, memory to fill


class Filling:
    """A segment that is, or was, filled here."""

    __slots__ = ("file", "id", "slots", "users")

    def __init__(self, name: FileId, file: File, capacity: int) -> None:
        self.id = name
        self.file = file
        self.slots = Slots(capacity, CHUNK_BYTES_DEFAULT)
        self.users = 0  # puts under way


class Segments:
    """The segment files of one namespace, as this process uses them."""

    def __init__(
        self,
        fs: FileSystem,
        directory: str,
        view: View,
        own: OwnLog,
        tasks: TaskSet,
        *,
        writer: int,
        segment_bytes: int,
        byte_cap: int,
    ) -> None:
        self._fs = fs
        self._directory = directory
        self._view = view
        self._own = own
        self._tasks = tasks
        self._writer = writer
        self._segment_bytes = segment_bytes
        self._byte_cap = byte_cap
        self._number = 0
        self._filling: Filling | None = None
        self._placing = asyncio.Lock()
        self._evicting = asyncio.Lock()
        self._files: OrderedDict[FileId, File] = OrderedDict()  # least recently used first
        self._opening: dict[FileId, asyncio.Task[File | OSError]] = {}

    # ------------------------------------------------------------ reading

    async def file(self, segment: FileId) -> File:
        """The open file of a segment. Raises FileNotFoundError when it was evicted."""
        found = self._files.get(segment)
        if found is not None:
            self._files.move_to_end(segment)
            return found
        task = self._opening.get(segment)
        if task is None:
            name = f"open segment {file_name(segment)}"
            task = self._opening[segment] = self._tasks.spawn(self._open(segment), name=name)
        opened = await asyncio.shield(task)
        if isinstance(opened, OSError):
            raise opened
        return opened

    async def _open(self, segment: FileId) -> File | OSError:
        try:
            file = await self._fs.open(self._path(segment), direct=True)
        except OSError as problem:
            return problem
        finally:
            del self._opening[segment]
        self._keep(segment, file)
        return file

    async def read_all(self, requests: Sequence[ReadRequest]) -> list[int | OSError]:
        """Fill each memory from the offset of its file; bytes, or the error, of each."""
        return list(await self._fs.read_many(requests))

    def _keep(self, segment: FileId, file: File) -> None:
        self._files[segment] = file
        if self._filling is not None and self._filling.id in self._files:
            self._files.move_to_end(self._filling.id)
        while len(self._files) > OPEN_MAX:
            self._close(self._files.popitem(last=False)[1])

    def close_dead(self) -> None:
        """Close what was evicted: its space is free when nobody has it open any more."""
        for segment in [name for name in self._files if self._view.index.is_dead(name)]:
            self._close(self._files.pop(segment))

    def _close(self, file: File) -> None:
        self._tasks.spawn(close_quietly(file), name=f"close {file.name}")

    # ------------------------------------------------------------ writing

    async def place(self, lengths: Sequence[int]) -> list[tuple[Filling, int]]:
        """Slots for blocks, as (segment, offset); `release` them when all is written or given up.

        Makes new segments, and room for them by eviction. Raises OSError.
        """
        placed: list[tuple[Filling, int]] = []
        try:
            async with self._placing:
                for length in lengths:
                    filling = self._filling
                    if filling is not None and self._view.index.is_dead(filling.id):
                        filling = None
                    offset = None if filling is None else filling.slots.take(length)
                    if filling is None or offset is None:
                        filling = await self._next()
                        offset = filling.slots.take(length)
                        assert offset is not None, "a block is larger than a segment"
                    filling.users += 1
                    placed.append((filling, offset))
        except BaseException:
            self.release(placed)
            raise
        return placed

    def release(self, placed: Sequence[tuple[Filling, int]]) -> None:
        """The puts into these slots have ended."""
        for filling, _ in placed:
            filling.users -= 1
            if not filling.users and filling is not self._filling:
                self._tasks.spawn(self._seal(filling), name=f"seal {filling.file.name}")

    async def _next(self) -> Filling:
        last, self._filling = self._filling, None
        if last is not None and not last.users:
            self._tasks.spawn(self._seal(last), name=f"seal {last.file.name}")
        self._number += 1
        name = FileId(self._writer, self._number)
        # Tell, then look, then make room: of two who do so at the same time the later one sees
        # both, so that the files of all together stay below the cap.
        await self._own.append([Opened(name, self._segment_bytes)])
        await self._view.look_now()
        await self.evict(name)
        file = await self._fs.open(self._path(name), "x+", direct=True)
        try:
            await file.truncate(self._segment_bytes)
        except BaseException:
            self._close(file)
            raise
        self._keep(name, file)
        self._filling = Filling(name, file, self._segment_bytes)
        return self._filling

    async def _seal(self, filling: Filling) -> None:
        if self._view.index.is_dead(filling.id):
            return
        try:
            await self._own.append([Sealed(filling.id, filling.slots.end)])
            await filling.file.fsync()  # nobody waits for it: a power cut costs only what is young
        except OSError as problem:
            log.warning("sealing %s: %s", filling.file.name, problem)

    # ------------------------------------------------------------ evicting

    async def evict(self, begun: FileId | None = None) -> None:
        """Remove what was not used for longest until the cap is kept. Raises OSError.

        `begun` is a segment whose file is to be made.
        """
        async with self._evicting:
            keep = {begun} if self._filling is None else {begun, self._filling.id}
            async with self._view.lock:  # not while half of what the logs say is known
                victims = self._view.index.victims(self._byte_cap, keep)
            await self._remove(victims)

    async def free_empty(self) -> None:
        """Remove segments of which nothing is left. Raises OSError."""
        async with self._evicting:
            async with self._view.lock:
                segments = self._view.index.segments()
                victims = [s.id for s in segments if s.sealed and not s.live]
            await self._remove(victims)

    async def _remove(self, victims: Sequence[FileId]) -> None:
        if not victims:
            return
        states = {segment.id: segment for segment in self._view.index.segments()}
        blocks = sum(states[name].live for name in victims if name in states)
        await self._own.append([Evicted(victims)])
        metrics.EVICTED_SEGMENTS.inc(len(victims))
        metrics.EVICTED_BLOCKS.inc(blocks)
        self.close_dead()
        await gather_all([remove_quietly(self._fs, self._path(name)) for name in victims])

    def _path(self, segment: FileId) -> str:
        return f"{self._directory}/{file_name(segment)}"

    async def close(self) -> None:
        """Seal what is being filled, close all files."""
        filling, self._filling = self._filling, None
        if filling is not None and not filling.users:
            await self._seal(filling)
        files = list(self._files.values())
        self._files.clear()
        await gather_all([close_quietly(file) for file in files])
