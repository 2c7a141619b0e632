"""A cache of KV blocks that several processes, also of several hosts, share.

    async with await KVCache.open(fs, "/kv", namespace=("llama", 0), byte_cap=64 * GiB) as cache:
        await cache.put_many(keys, blocks)
        lengths = await cache.get_many(keys, buffers)  # 0: a miss

Blocks lie in segments, large files that one process appends to; a log per process says where each
block is (docs/kvcache.md). A block is in the caller's buffer only when it was verified. What goes
wrong with storage is a miss and is counted, never an exception.

Data passes through memory of this client, since after a deadline a server may still be reading or
writing what a call named: buffers of the caller are at rest when a call returns.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from itertools import compress, islice
from typing import Any, Self
from urllib.parse import quote

from emberfs.client.file import FileSystem, Memory, buffer_of
from emberfs.client.gather import gather_all
from emberfs.client.kvcache import metrics
from emberfs.client.kvcache.breaker import Breaker
from emberfs.client.kvcache.call import Call
from emberfs.client.kvcache.index import Location
from emberfs.client.kvcache.ownlog import OwnLog
from emberfs.client.kvcache.reading import Reader
from emberfs.client.kvcache.records import KEY_BYTES_MAX, KEYS_MAX, SLOT_BYTES, Remove, Touched
from emberfs.client.kvcache.segments import Segments
from emberfs.client.kvcache.snapshot import Snapshots
from emberfs.client.kvcache.staging import Staging
from emberfs.client.kvcache.view import View
from emberfs.client.kvcache.writing import Writer
from emberfs.fabric.region import view_of
from emberfs.proto.ids import MS, SECOND, GiB, MiB
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.client.kvcache")

BLOCK_BYTES = 64 * 576 * 2  # FlashMLA's paged latent cache: 64 tokens, 576 values of bf16, a layer
BLOCK_BYTES_MAX = 16 * MiB
SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX = 4 * MiB, 256 * MiB
SEGMENTS_MIN = 4  # that fit under the cap
DEADLINE_NS = 1 * SECOND
REFRESH_NS = 100 * MS
TICK_NS = 1 * SECOND
TOUCH_NS = 1 * SECOND  # others hear so often what was read here
SNAPSHOT_EVERY_BYTES = 16 * MiB  # of records
LOGS_MAX = 32  # finished ones, until somebody writes a snapshot
LOGS_CHANCE = 0.25  # per tick, so that not all who see them do
REMOVE_KEYS_MAX = 3 * KEYS_MAX  # published by one append, which they fit into
FAILURES_MAX = 3
BREAK_FIRST_NS, BREAK_MAX_NS = 1 * SECOND, 30 * SECOND


class KVCache:
    """Blocks of bytes by key. For any number of tasks of one event loop."""

    def __init__(
        self,
        fs: FileSystem,
        directory: str,
        *,
        byte_cap: int,
        segment_bytes: int,
        block_bytes_max: int,
        deadline_ns: int,
        refresh_ns: int,
        snapshot_every_bytes: int,
    ) -> None:
        """Use `open`."""
        self._env = fs.cluster.env
        self._deadline_ns = deadline_ns
        self._refresh_ns = refresh_ns
        self._block_bytes_max = block_bytes_max
        self._snapshot_every_bytes = snapshot_every_bytes
        self._tasks = TaskSet()
        self._staging = Staging()
        # Of their own: a full disk is no reason not to read.
        self._reading, self._changing = (
            Breaker(FAILURES_MAX, BREAK_FIRST_NS, BREAK_MAX_NS) for _ in range(2)
        )
        self._touched_ns = self._env.now_ns()
        self._closed = False
        writer = self._env.random.getrandbits(64)
        logs, segments = f"{directory}/index", f"{directory}/segments"
        self._view = View(fs, logs, self._tasks, directory.rpartition("/")[2])
        self._own = OwnLog(
            fs,
            logs,
            writer,
            self._tasks,
            sequence=lambda: self._view.index.sequence,
            apply=lambda batch: self._view.index.apply(writer, batch),
            left=lambda name, offset, ended: self._view.follow(name, offset, ended),
        )
        self._view.own = self._own
        self._segments = Segments(
            fs,
            segments,
            self._view,
            self._own,
            self._tasks,
            writer=writer,
            segment_bytes=segment_bytes,
            byte_cap=byte_cap,
        )
        self._reader = Reader(self._view, self._segments, self._staging)
        self._writer = Writer(self._view, self._segments, self._own, self._staging)
        self._snapshots = Snapshots(fs, logs, segments, self._view, self._own, writer)

    @classmethod
    async def open(
        cls,
        fs: FileSystem,
        directory: str,
        *,
        namespace: tuple[str, int] | str,
        byte_cap: int,
        segment_bytes: int | None = None,
        block_bytes_max: int = BLOCK_BYTES_MAX,
        deadline_ns: int = DEADLINE_NS,
        refresh_ns: int = REFRESH_NS,
        snapshot_every_bytes: int = SNAPSHOT_EVERY_BYTES,
    ) -> "KVCache":
        """Open or make a namespace, (model, rank) or a name, below `directory`.

        All who open a namespace share `byte_cap`, bytes of segments; they should name the same. A
        block of another process is found by a call that begins `refresh_ns` after it was put.
        Raises ValueError for settings that cannot be, FileSystemError if storage does not answer.
        """
        if segment_bytes is None:
            segment_bytes = max(SEGMENT_BYTES_MIN, min(SEGMENT_BYTES_MAX, byte_cap // 64))
            segment_bytes -= segment_bytes % MiB
        if segment_bytes < SLOT_BYTES or segment_bytes > 4 * GiB:
            raise ValueError(f"segment_bytes={segment_bytes}: use 4096 bytes to 4 GiB")
        if byte_cap < SEGMENTS_MIN * segment_bytes:
            least = SEGMENTS_MIN * segment_bytes
            raise ValueError(f"byte_cap={byte_cap}: use {least} or more, or smaller segment_bytes")
        if block_bytes_max < 1:
            raise ValueError(f"block_bytes_max={block_bytes_max}: use 1 or more")
        where = f"{directory.rstrip('/')}/{_namespace_name(namespace)}"
        for part in ("index", "segments"):
            await fs.makedirs(f"{where}/{part}", exist_ok=True)
        cache = cls(
            fs,
            where,
            byte_cap=byte_cap,
            segment_bytes=segment_bytes,
            block_bytes_max=min(block_bytes_max, segment_bytes, BLOCK_BYTES_MAX),
            deadline_ns=deadline_ns,
            refresh_ns=refresh_ns,
            snapshot_every_bytes=snapshot_every_bytes,
        )
        try:
            await cache._view.load()
        except BaseException:
            await cache._tasks.close()
            raise
        cache._tasks.spawn(cache._tick(), name="kvcache housekeeping")
        return cache

    async def __aenter__(self) -> Self:
        """Nothing to do."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()

    def __len__(self) -> int:
        """How many blocks this process knows of."""
        return len(self._view.index)

    @property
    def stored_bytes(self) -> int:
        """What counts for the cap, as far as this process knows: whole segments."""
        return self._view.index.total_bytes()

    # ------------------------------------------------------------ calls

    async def get_many(
        self, keys: Sequence[bytes], buffers: Sequence[Memory], *, deadline_ns: int | None = None
    ) -> list[int]:
        """Read blocks into the caller's buffers; returns the length of each, 0 for a miss.

        A buffer may be longer than its block; it is changed only by a hit. Never raises for what
        storage does; ValueError for keys and buffers that cannot be.
        """
        _check_keys(keys)
        sinks = _views(keys, buffers, writable=True)
        call = Call(len(keys))
        misses = await self._bounded("get", lambda: self._get(keys, sinks, call), call, deadline_ns)
        found = sum(call.lengths)
        metrics.HITS.inc(len(keys) - misses.total())
        metrics.READ_BYTES.inc(found)
        for reason, count in misses.items():
            metrics.MISSES.labels(reason).inc(count)
        return call.lengths

    async def put_many(
        self, keys: Sequence[bytes], buffers: Sequence[Memory], *, deadline_ns: int | None = None
    ) -> list[bool]:
        """Store blocks; True for each that is published: any process may find it.

        An older block of a key is replaced. Buffers may be used again on return. Never raises for
        what storage does; ValueError for keys and buffers that cannot be.
        """
        _check_keys(keys)
        sources = _views(keys, buffers, writable=False)
        for key, source in zip(keys, sources, strict=True):
            if not 0 < len(source) <= self._block_bytes_max:
                raise ValueError(
                    f"block {key.hex()} of {len(source)} bytes: use 1 to {self._block_bytes_max}"
                )
        call = Call(len(keys))
        work = lambda: self._writer.put(keys, sources, call)  # noqa: E731
        failures = await self._bounded("put", work, call, deadline_ns)
        metrics.PUTS.inc(len(keys) - failures.total())
        metrics.PUT_BYTES.inc(sum(call.lengths))
        for reason, count in failures.items():
            metrics.PUT_FAILURES.labels(reason).inc(count)
        return [length > 0 for length in call.lengths]

    async def exists_many(
        self, keys: Sequence[bytes], *, deadline_ns: int | None = None
    ) -> list[bool]:
        """Tell which blocks can be found; nothing is read of them."""
        _check_keys(keys)
        call = Call(len(keys))
        found = self._view.index.present(keys)
        if not all(found):
            await self._bounded("exists", lambda: self._look(call), call, deadline_ns)
            found = self._view.index.present(keys)
        return found

    async def remove_many(
        self, keys: Sequence[bytes], *, deadline_ns: int | None = None
    ) -> list[bool]:
        """Remove blocks; True for each that was there and is gone.

        Other processes may find it for `refresh_ns` or a second yet. Space is free again when a
        whole segment is empty, or is evicted.
        """
        _check_keys(keys)
        call = Call(len(keys))
        await self._bounded("remove", lambda: self._remove(keys, call), call, deadline_ns)
        metrics.REMOVALS.inc(sum(call.lengths))
        return [length > 0 for length in call.lengths]

    async def close(self) -> None:
        """End the log of this process; bounded by the deadline of calls."""
        if self._closed:
            return
        self._closed = True
        ending = asyncio.ensure_future(self._end())
        await asyncio.wait({ending}, timeout=self._deadline_ns / SECOND)
        if not ending.done():
            ending.cancel()
        await self._tasks.close()
        await asyncio.gather(ending, return_exceptions=True)
        self._staging.close()

    async def _end(self) -> None:
        try:
            await self._segments.close()
            await self._own.close()
        except OSError as problem:
            log.warning("closing a KV cache: %s", problem)

    # ------------------------------------------------------------ bounds

    async def _bounded(
        self,
        name: str,
        work: Callable[[], Coroutine[Any, Any, None]],
        call: Call,
        deadline_ns: int | None,
    ) -> "Counter[str]":
        """Do the work of a call within its deadline; returns why what was not done was not."""
        if self._closed:
            raise ValueError("the KV cache is closed")
        began_ns = self._env.now_ns()
        breaker = self._changing if name in ("put", "remove") else self._reading
        if not breaker.allows(began_ns):
            return call.settle("breaker")
        outcome, was_open = "", breaker.is_open
        task = self._tasks.spawn(self._guarded(work, call), name=f"kvcache {name}")
        limit_ns = self._deadline_ns if deadline_ns is None else deadline_ns
        try:
            # Not asyncio.timeout: a cancelled call ends only when the server has confirmed it.
            await asyncio.wait({task}, timeout=limit_ns / SECOND)
        except asyncio.CancelledError:
            breaker.gave_up()
            raise
        finally:
            done = task.done()
            if not done:
                task.cancel()
        if not done:
            outcome = "timeout"
        elif call.failed or task.cancelled() or task.exception() is not None:
            outcome = "failed"
        now_ns = self._env.now_ns()
        misses = call.settle(outcome)
        if outcome:
            metrics.FAILED_CALLS.labels(outcome).inc()
        if outcome and not call.reached:
            breaker.failed(now_ns)
            if breaker.is_open and not was_open:
                metrics.BREAKER_OPENED.inc()
        elif call.reached:
            breaker.succeeded()
        else:
            breaker.gave_up()
        metrics.CALL_SECONDS.labels(name).observe((now_ns - began_ns) / SECOND)
        return misses

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, None]], call: Call) -> None:
        try:
            await work()
        except OSError as problem:
            call.failed = True
            log.info("KV cache: %s", problem)

    async def _look(self, call: Call) -> None:
        await self._view.catch_up(self._refresh_ns)
        call.reached = True

    # ------------------------------------------------------------ get

    async def _get(self, keys: Sequence[bytes], sinks: Sequence[memoryview], call: Call) -> None:
        index = self._view.index
        places: list[tuple[int, Location]] = []
        absent: list[int] = []
        for position, key in enumerate(keys):
            found = index.find(key)
            if found is None:
                absent.append(position)
            else:
                places.append((position, found))

        async def look_for_absent() -> None:
            await self._look(call)
            index = self._view.index
            late = [(n, found) for n in absent if (found := index.find(keys[n])) is not None]
            await self._reader.fetch(late, keys, sinks, call)

        if absent:
            await gather_all([self._reader.fetch(places, keys, sinks, call), look_for_absent()])
        else:
            await self._reader.fetch(places, keys, sinks, call)

    # ------------------------------------------------------------ remove

    async def _remove(self, keys: Sequence[bytes], call: Call) -> None:
        found = self._view.index.present(keys)
        if not all(found):
            await self._look(call)
            found = self._view.index.present(keys)
        there = dict(zip(compress(keys, found), compress(range(len(keys)), found), strict=True))
        names, lengths = list(there), call.lengths
        for first in range(0, len(names), REMOVE_KEYS_MAX):
            part = names[first : first + REMOVE_KEYS_MAX]
            starts = range(0, len(part), KEYS_MAX)
            await self._own.append([Remove(part[at : at + KEYS_MAX]) for at in starts])
            call.reached = True
            if call.over:
                return
            for position in islice(there.values(), first, first + len(part)):
                lengths[position] = 1

    # ------------------------------------------------------------ housekeeping

    async def _tick(self) -> None:
        while True:
            await self._env.sleep_ns(TICK_NS)
            try:
                await self._keep_house()
            except OSError as problem:
                log.info("KV cache: %s", problem)

    async def _keep_house(self) -> None:
        await self._view.catch_up(TICK_NS // 2)
        self._segments.close_dead()
        now_ns = self._env.now_ns()
        if self._reader.touched and now_ns - self._touched_ns > TOUCH_NS:
            self._touched_ns = now_ns
            read, self._reader.touched = list(self._reader.touched), {}
            await self._own.append([Touched(read)])
        await self._own.keep_alive()
        await self._segments.free_empty()
        await self._segments.evict()
        many = len(self._view.finished()) > LOGS_MAX and self._env.random.random() < LOGS_CHANCE
        if many or self._own.appended_bytes > self._snapshot_every_bytes:
            await self._snapshots.write()


def _namespace_name(namespace: tuple[str, int] | str) -> str:
    text = namespace if isinstance(namespace, str) else f"{namespace[0]}@{namespace[1]}"
    name = quote(text, safe="@")
    if not text or len(name) > 255 or name in (".", ".."):
        raise ValueError(f"namespace {namespace!r}: use a name of 1 to 255 bytes")
    return name


def _check_keys(keys: Sequence[bytes]) -> None:
    if set(map(type, keys)) <= {bytes}:
        sizes = set(map(len, keys))
        if not sizes or (min(sizes) > 0 and max(sizes) <= KEY_BYTES_MAX):
            return
    for key in keys:
        if not isinstance(key, bytes) or not 0 < len(key) <= KEY_BYTES_MAX:
            raise ValueError(f"key {key!r}: use bytes, 1 to {KEY_BYTES_MAX} of them")


def _views(keys: Sequence[bytes], buffers: Sequence[Memory], *, writable: bool) -> list[memoryview]:
    if len(keys) != len(buffers):
        raise ValueError(f"{len(keys)} keys and {len(buffers)} buffers: use one for each")
    views = [view_of(buffer_of(buffer)) for buffer in buffers]
    for number, view in enumerate(views):
        if writable and view.readonly:
            raise ValueError(f"buffer {number} is read-only: use one that can be written")
    return views
