"""What this process knows of a namespace: the index, kept up with the logs of all writers.

It begins with the newest snapshot and the logs behind it, so that a start costs what is live and a
bounded rest, not the history. Then it reads on in the logs, at a bounded rate. A log that was
removed before it was read here is in a snapshot: then everything is loaded anew.
"""

import asyncio
import logging
from collections.abc import Iterable

from emberfs.client.file import File, FileSystem
from emberfs.client.gather import gather_all
from emberfs.client.kvcache import metrics
from emberfs.client.kvcache.index import Index
from emberfs.client.kvcache.ownlog import DEAD_NS, OwnLog, close_quietly
from emberfs.client.kvcache.records import (
    BODY_BYTES_MAX,
    HEAD_BYTES,
    Covered,
    End,
    FileId,
    decode,
)
from emberfs.client.kvcache.slots import log_name, parse_log, parse_snapshot, snapshot_name
from emberfs.proto.ids import SECOND, KiB, MiB
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.client.kvcache")

TAIL_BYTES = 8 * KiB  # how much of a log is read at first
WINDOW_BYTES = 4 * MiB
LOAD_TRIES = 8  # each means that somebody has written a snapshot meanwhile


class Follower:
    """One log that is read here."""

    __slots__ = ("ended", "file", "grew_ns", "id", "offset")

    def __init__(self, name: FileId, offset: int, now_ns: int) -> None:
        self.id = name
        self.offset = offset  # all before it was read, bytes
        self.file: File | None = None
        self.ended = False
        self.grew_ns = now_ns


class Loaded:
    """A view as it is loaded."""

    def __init__(self) -> None:
        self.index = Index()
        self.followers: dict[FileId, Follower] = {}
        self.snapshot = 0  # its number
        self.covered: dict[FileId, int] = {}


class View:
    """The index and the logs that feed it."""

    def __init__(self, fs: FileSystem, directory: str, tasks: TaskSet, label: str) -> None:
        """`label` names it in the counters."""
        self._fs = fs
        self._env = fs.cluster.env
        self._directory = directory
        self._tasks = tasks
        self._blocks = metrics.BLOCKS.labels(label)
        self._now = Loaded()
        self._task: asyncio.Task[OSError | None] | None = None
        self._began_ns = -(1 << 62)
        self.own: OwnLog | None = None  # set by who makes both
        self.lock = asyncio.Lock()  # held while logs of others are applied

    @property
    def index(self) -> Index:
        """Another object after everything was loaded anew."""
        return self._now.index

    @property
    def followers(self) -> dict[FileId, Follower]:
        """The logs of others, and own ones whose last append is uncertain."""
        return self._now.followers

    @property
    def snapshot(self) -> int:
        """Number of the newest snapshot that says nothing new; 0: there is none."""
        return self._now.snapshot

    def covered_by(self, number: int, logs: dict[FileId, int]) -> None:
        """A snapshot was written from what is known here."""
        self._now.snapshot, self._now.covered = number, logs

    def follow(self, name: FileId, offset: int, ended: bool) -> None:
        """A log of our own is not written any more; read on in it unless it has ended."""
        follower = self.followers[name] = Follower(name, offset, self._env.now_ns())
        follower.ended = ended

    def lost(self, segment: FileId) -> None:
        """A segment's file is not there."""
        self.index.drop(segment)

    # ------------------------------------------------------------ keeping up

    async def load(self) -> None:
        """Load everything. Raises OSError."""
        async with self.lock:
            self._take(await self._load())

    async def catch_up(self, age_ns: int) -> None:
        """Read on in the logs, unless a look at them began less than `age_ns` ago.

        Waits for a look that is under way. Raises OSError.
        """
        if self._task is None or self._task.done():
            now_ns = self._env.now_ns()
            if now_ns - self._began_ns < age_ns:
                return
            self._began_ns = now_ns
            self._task = self._tasks.spawn(self._refresh(), name="kvcache refresh")
        problem = await asyncio.shield(self._task)
        if problem is not None:
            raise problem

    async def look_now(self) -> None:
        """A look that begins now. Raises OSError."""
        if self._task is not None and not self._task.done():
            await asyncio.shield(self._task)
        await self.catch_up(0)

    async def _refresh(self) -> OSError | None:
        began_ns = self._env.now_ns()
        try:
            async with self.lock:
                for _ in range(LOAD_TRIES):
                    if await self._look():
                        break
                else:
                    return TimeoutError(f"{self._directory}: logs go faster than they can be read")
        except OSError as problem:
            return problem
        metrics.REFRESH_SECONDS.observe((self._env.now_ns() - began_ns) / SECOND)
        self._blocks.set(len(self.index))
        return None

    async def _look(self) -> bool:
        """Read all logs to their ends; False if one of them went meanwhile: look again."""
        names = await self._fs.listdir(self._directory)
        logs = _logs_of(names)
        newest = _snapshots_of(names)[0]
        now, covered = self._now, self._now.covered
        if newest > now.snapshot:
            # Of one that was skipped nobody tells any more what it held.
            anew = newest > now.snapshot + 1
            if not anew:
                found = await self._read_covered(newest)
                if found is None:  # a newer one is there
                    return False
                anew, covered = not self._knows(found, logs), found
            if anew:
                await self._load_anew()
                return True
        for name in logs - now.followers.keys():
            if name != self._own_log():
                now.followers[name] = Follower(name, 0, self._env.now_ns())
        for name in now.followers.keys() - logs:
            self._forget(now.followers.pop(name))
        reading = [f for f in now.followers.values() if not f.ended]
        try:
            await gather_all([self._read_on(follower, now.index) for follower in reading])
        except FileNotFoundError:
            return False
        now.snapshot, now.covered = newest, covered  # only now all is read that it has replaced
        now.index.end_round()
        return True

    def finished(self) -> set[FileId]:
        """Logs to which nothing will be added: ended, followed by another, or silent for long."""
        now_ns, own = self._env.now_ns(), self._own_log()
        last: dict[int, int] = {} if own is None else {own.writer: own.number}
        for name in self.followers:
            last[name.writer] = max(last.get(name.writer, 0), name.number)
        return {
            name
            for name, follower in self.followers.items()
            if follower.ended
            or name.number < last[name.writer]
            or now_ns - follower.grew_ns > DEAD_NS
        }

    def _own_log(self) -> FileId | None:
        return None if self.own is None else self.own.current

    def _knows(self, covered: dict[FileId, int], logs: set[FileId]) -> bool:
        """Tell whether all that a snapshot holds was, or can be, read in the logs."""
        own = self._own_log()
        for name, offset in covered.items():
            follower = self._now.followers.get(name)
            if name == own or name in logs:
                continue
            if follower is None and self._now.covered.get(name, -1) >= offset:
                continue  # gone with an earlier snapshot
            if follower is None or follower.offset < offset:
                return offset == 0
        return True

    async def _load_anew(self) -> None:
        log.info("a log was removed before it was read here: loading the index anew")
        assert self.own is not None
        async with self.own.lock:
            fresh = await self._load()
            own = self.own.current
            if own in fresh.followers:
                self._forget(fresh.followers.pop(own))
            fresh.index.sequence = max(fresh.index.sequence, self.index.sequence)
            fresh.index.touch([segment.id for segment in self.index.segments()])
            for follower in self.followers.values():
                self._forget(follower)
            self._take(fresh)

    def _take(self, fresh: Loaded) -> None:
        self._now = fresh
        self._blocks.set(len(fresh.index))

    def _forget(self, follower: Follower) -> None:
        if follower.file is not None:
            name = f"close {follower.file.name}"
            self._tasks.spawn(close_quietly(follower.file), name=name)
            follower.file = None

    # ------------------------------------------------------------ loading

    async def _load(self) -> Loaded:
        for _ in range(LOAD_TRIES):
            found = await self._try_load()
            if found is not None:
                return found
        raise TimeoutError(f"{self._directory}: snapshots change faster than they can be read")

    async def _try_load(self) -> Loaded | None:
        names = await self._fs.listdir(self._directory)
        loaded = Loaded()
        for number in _snapshots_of(names):
            loaded = Loaded()
            try:
                sound = number == 0 or await self._read_snapshot(number, loaded)
            except FileNotFoundError:
                return None
            if sound:
                break
            log.error("%s/%s is damaged", self._directory, snapshot_name(number))
        loaded.snapshot = _snapshots_of(names)[0]  # also if it is damaged: there is no more to have
        now_ns = self._env.now_ns()
        for name in _logs_of(names):
            offset = loaded.covered.get(name, 0)
            loaded.followers[name] = Follower(name, offset, now_ns)
        try:
            reading = loaded.followers.values()
            await gather_all([self._read_on(f, loaded.index) for f in reading])
        except BaseException as problem:
            for follower in loaded.followers.values():
                self._forget(follower)
            if isinstance(problem, FileNotFoundError):
                return None
            raise
        after = await self._fs.listdir(self._directory)
        if _snapshots_of(after)[0] != _snapshots_of(names)[0]:
            for follower in loaded.followers.values():
                self._forget(follower)
            return None
        return loaded

    async def _read_snapshot(self, number: int, into: Loaded) -> bool:
        """Apply a snapshot; False if it is damaged."""
        path = f"{self._directory}/{snapshot_name(number)}"
        count, name = 0, FileId(number, 0)
        async with await self._fs.open(path) as file:
            offset, memory = 0, memoryview(bytearray(WINDOW_BYTES))
            while True:
                size = await file.pread(memory, offset)
                found = decode(name, offset, memory[:size])
                for batch in found.batches:
                    if isinstance(batch.message, End):
                        return batch.message.batches == count
                    if isinstance(batch.message, Covered):
                        into.covered = dict(batch.message.logs)
                    # Orders are in the entries; the sequence is of the whole.
                    into.index.apply(0, batch)
                    count += 1
                offset += found.used
                if not found.used:
                    return False

    async def _read_covered(self, number: int) -> dict[FileId, int] | None:
        """Which logs a snapshot holds; None if it has gone."""
        path = f"{self._directory}/{snapshot_name(number)}"
        memory = memoryview(bytearray(HEAD_BYTES + BODY_BYTES_MAX))
        try:
            async with await self._fs.open(path) as file:
                size = await file.pread(memory, 0)
        except FileNotFoundError:
            return None
        found = decode(FileId(number, 0), 0, memory[:size]).batches
        if not found or not isinstance(found[0].message, Covered):
            log.error("%s is damaged", path)
            return {}
        return dict(found[0].message.logs)

    async def _read_on(self, follower: Follower, index: Index) -> None:
        if follower.file is None:
            path = f"{self._directory}/{log_name(follower.id)}"
            follower.file = await self._fs.open(path, direct=True)
        size = TAIL_BYTES
        while True:
            memory = memoryview(bytearray(size))
            count = await follower.file.pread(memory, follower.offset)
            if not count and not follower.offset:  # it is just being made
                self._forget(follower)
                return
            found = decode(follower.id, follower.offset, memory[:count])
            for batch in found.batches:
                index.apply(follower.id.writer, batch)
                follower.ended |= isinstance(batch.message, End)
            if found.used:
                follower.offset += found.used
                follower.grew_ns = self._env.now_ns()
            if not found.wanted or count < size:
                return
            size = max(MiB, found.wanted)


def _logs_of(names: Iterable[str]) -> set[FileId]:
    return {found for name in names if (found := parse_log(name)) is not None}


def _snapshots_of(names: Iterable[str]) -> list[int]:
    """Numbers of snapshots, the newest first; 0, which stands for none, is the last."""
    numbers = {found for name in names if (found := parse_snapshot(name)) is not None}
    return sorted(numbers | {0}, reverse=True)
