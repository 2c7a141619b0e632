"""Filling a SYNCING target from its predecessor, while reads and writes go on.

Every update since the chain version under which the target is SYNCING reaches it as a whole chunk
(craq.py). So it is complete once each chunk that differed was sent once under the chunk's lock,
provided that the updates begun before that chain version have ended: `settled` sees to it.

A chunk that is damaged on the only complete replica is sent as it is, with the checksums that
refute it: then both have what is good of it, whoever reads the rest is told, and the target serves.

A failure of one chunk does not hold up the others; one of the connection or of the chain ends the
session. As long as the chain says SYNCING, another session begins. The target that is being filled
hears once a second how it goes and leaves by itself when that does not advance (target.py).
"""

import asyncio
import logging
from collections.abc import Callable

from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, ChunkId
from emberfs.proto.storage_calls import ChunkRow, ListRequest, SyncRequest
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.storage.forward import OwnDamageError, Sender
from emberfs.storage.links import Links
from emberfs.storage.metrics import SYNCED_BYTES
from emberfs.storage.progress import Progress
from emberfs.storage.replica import TargetReplica
from emberfs.storage.resync import END, Comparison, Transfer, common_end, compare
from emberfs.storage.view import View

log = logging.getLogger("emberfs.storage.filling")

PAGE_CHUNKS = 512
TRANSFERS_MAX = 8  # chunks in flight
PROGRESS_NS = 1 * SECOND
# After a complete session the chain changes at once; if it does not (the target restarted before
# mgmtd heard of it), the work is checked again.
RECHECK_NS = 3 * SECOND
# What no other chunk would fare better with.
ENDS_SESSION = frozenset(
    {
        Code.CHAIN_VERSION,
        Code.NOT_SERVING,
        Code.DISCONNECTED,
        Code.UNREACHABLE,
        Code.TIMEOUT,
        Code.SHUTTING_DOWN,
        Code.DISK,
    }
)


class Throttle:
    """Spreads bytes over time; no limit when the rate is 0."""

    def __init__(self, env: Env, bytes_per_s: int) -> None:
        self._env = env
        self._bytes_per_s = bytes_per_s
        self._free_ns = 0

    async def pay(self, count: int, waits: Callable[[], None] = lambda: None) -> None:
        """Wait until `count` more bytes may be sent; `waits` is called now and then meanwhile."""
        if self._bytes_per_s <= 0:
            return
        now_ns = self._env.now_ns()
        start_ns = max(self._free_ns, now_ns)
        self._free_ns = start_ns + count * SECOND // self._bytes_per_s
        while start_ns > now_ns:
            waits()
            await self._env.sleep_ns(min(start_ns - now_ns, SECOND))
            now_ns = self._env.now_ns()
        waits()


class Recovery:
    """Drives the recovery of one target's successor, for ever."""

    def __init__(
        self, env: Env, replica: TargetReplica, sender: Sender, links: Links, throttle: Throttle
    ) -> None:
        self._env = env
        self._replica = replica
        self._sender = sender
        self._links = links
        self._throttle = throttle
        self._progress = Progress()

    async def run(self) -> None:
        """Watch the chain and fill whoever is to be filled."""
        backoff = Backoff(200 * MS, 2 * SECOND)
        while True:
            view = self._replica.view
            if not (view.serving and view.tail_here and view.successor_syncing):
                backoff.reset()
                self._progress = Progress()
                await self._replica.view_change()
                continue
            try:
                await self._session(view)
                pause_ns = RECHECK_NS
            except (EmberfsError, OSError) as problem:
                log.warning("filling target %d: %s; tries again", view.successor, problem)
                self._progress.failed(str(problem))
                pause_ns = backoff.next_ns(self._env.random)
            await self._replica.view_change_within(view, pause_ns)

    async def _session(self, view: View) -> None:
        """Everything that differs is sent once; meanwhile the target hears of it."""
        telling = asyncio.ensure_future(self._tell_now_and_then(view))
        try:
            await self._fill(view)
        finally:
            telling.cancel()
            await asyncio.wait([telling])

    async def _tell_now_and_then(self, view: View) -> None:
        while True:
            try:
                await self._tell(view, done=False)
            except (EmberfsError, OSError) as problem:
                log.debug("target %d does not hear of its recovery: %s", view.successor, problem)
            await self._env.sleep_ns(PROGRESS_NS)

    async def _fill(self, view: View) -> None:
        replica, progress = self._replica, self._progress
        started_ns = self._env.now_ns()
        progress.begin(*await self._env.run_blocking(self._count), started_ns)
        await replica.settled()
        start, sent = b"", 0
        failures: list[EmberfsError] = []
        while True:
            stop, found = await self._compare_pages(view, start)
            progress.equal(found.same_chunks, found.same_bytes, self._env.now_ns())
            failures += await self._send_all(view, found.transfers)
            sent += len(found.transfers)
            if stop == END:
                break
            start = stop
        if failures:
            text = f"{len(failures)} chunks could not be sent, one because: {failures[0].message}"
            raise EmberfsError(failures[0].code, text)
        progress.complete()
        await self._tell(view, done=True)
        log.info(
            "target %d is filled: %d chunks sent in %.1f s",
            view.successor,
            sent,
            (self._env.now_ns() - started_ns) / SECOND,
        )

    def _count(self) -> tuple[int, int]:
        """Chunks and bytes of our own inventory. Blocks."""
        chunks = count = 0
        start = b""
        while True:
            rows, start = self._replica.store.list(start, b"", PAGE_CHUNKS)
            chunks += sum(1 for row in rows if row.version)
            count += sum(row.length for row in rows)
            if start == END:
                return chunks, count

    async def _compare_pages(self, view: View, start: bytes) -> tuple[bytes, Comparison]:
        """Compare the next page of both inventories; return where it ends and what differs."""
        # Theirs first: what they get meanwhile comes from us, so ours is never the older one.
        theirs = await self._links.list(
            ListRequest(view.successor, start, b"", PAGE_CHUNKS, with_tombstones=True)
        )
        own, own_next = await self._own_page(start)
        stop = common_end(own_next, theirs.next)
        return stop, compare(own, theirs.rows, stop)

    async def _own_page(self, start: bytes) -> tuple[list[ChunkRow], bytes]:
        store = self._replica.store
        return await self._env.run_blocking(
            lambda: store.list(start, b"", PAGE_CHUNKS, tombstones=True)
        )

    async def _send_all(self, view: View, transfers: tuple[Transfer, ...]) -> list[EmberfsError]:
        """Send some chunks, a few at a time; return why some of them could not be sent.

        Raises what ends the session.
        """
        waiting = list(reversed(transfers))
        failures: list[EmberfsError] = []

        async def send_some() -> None:
            while waiting:
                try:
                    await self._send(view, waiting.pop())
                except EmberfsError as problem:
                    if problem.code in ENDS_SESSION:
                        raise
                    failures.append(problem)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(TRANSFERS_MAX, len(transfers))):
                    group.create_task(send_some())
        except* (EmberfsError, OSError) as problems:
            raise _first(problems) from None
        return failures

    async def _send(self, view: View, transfer: Transfer) -> None:
        replica, chunk = self._replica, ChunkId(transfer.chunk)
        await self._throttle.pay(transfer.length, self._waits)
        async with replica.hold(chunk):
            if replica.view != view:
                raise EmberfsError(Code.CHAIN_VERSION, "the chain has changed")
            count = await self._send_held(view, chunk)
        SYNCED_BYTES.inc(count)
        self._progress.sent(count, self._env.now_ns())

    def _waits(self) -> None:
        self._progress.waits(self._env.now_ns())

    async def _send_held(self, view: View, chunk: ChunkId) -> int:
        """Send one chunk that stands still; mend it first if it is damaged and can be mended."""
        try:
            return await self._send_once(view, chunk, last_copy=False)
        except OwnDamageError as problem:
            await self._mend(chunk, problem)
        return await self._send_once(view, chunk, last_copy=True)

    async def _send_once(self, view: View, chunk: ChunkId, *, last_copy: bool) -> int:
        store = self._replica.store
        return await self._sender.send_committed(
            store,
            chunk,
            store.state(chunk),
            view.successor,
            view.chain_version,
            last_copy=last_copy,
        )

    async def _mend(self, chunk: ChunkId, damage: EmberfsError) -> None:
        """Try to; what no serving replica can mend goes as it is, and the scrubber tries again."""
        if self._replica.repair is None:
            return
        try:
            await self._replica.repair(chunk)
        except EmberfsError as problem:
            log.error("%s; %s", damage.message, problem.message)

    async def _tell(self, view: View, *, done: bool) -> None:
        progress, now_ns = self._progress, self._env.now_ns()
        request = SyncRequest(
            view.successor,
            view.chain_version,
            done,
            progress.done_bytes,
            progress.total_bytes,
            progress.done_chunks,
            progress.total_chunks,
            progress.bytes_per_s(now_ns),
            view.target,
            progress.problem(now_ns),
        )
        await self._links.sync(request)


def _first(problems: "BaseExceptionGroup[Exception]") -> Exception:
    found: BaseException = problems
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, Exception)
    return found
