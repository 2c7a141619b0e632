"""Filling a SYNCING target from its predecessor, while reads and writes go on.

Every update since the chain version under which the target is SYNCING reaches it as a whole chunk
(craq.py). So it is complete once each chunk that differed was sent once under the chunk's lock,
provided that the updates begun before that chain version have ended: `settled` sees to it.

Any failure ends the session; as long as the chain says SYNCING, another one begins.
"""

import asyncio
import logging

from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, ChunkId
from emberfs.proto.storage_calls import ChunkRow, ListRequest, SyncRequest
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.storage.forward import Sender
from emberfs.storage.links import Links
from emberfs.storage.metrics import SYNCED_BYTES
from emberfs.storage.replica import TargetReplica
from emberfs.storage.resync import END, Transfer, common_end, compare
from emberfs.storage.view import View

log = logging.getLogger("emberfs.storage.filling")

PAGE_CHUNKS = 512
TRANSFERS_MAX = 8  # chunks in flight
PROGRESS_NS = 500 * MS
# After a complete session the chain changes at once; if it does not (the target restarted before
# mgmtd heard of it), the work is checked again.
RECHECK_NS = 3 * SECOND


class Throttle:
    """Spreads bytes over time; no limit when the rate is 0."""

    def __init__(self, env: Env, bytes_per_s: int) -> None:
        self._env = env
        self._bytes_per_s = bytes_per_s
        self._free_ns = 0

    async def pay(self, count: int) -> None:
        """Wait until `count` more bytes may be sent."""
        if self._bytes_per_s <= 0:
            return
        now_ns = self._env.now_ns()
        start_ns = max(self._free_ns, now_ns)
        self._free_ns = start_ns + count * SECOND // self._bytes_per_s
        if start_ns > now_ns:
            await self._env.sleep_ns(start_ns - now_ns)


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
        self._done_bytes = 0
        self._total_bytes = 0
        self._told_ns = 0

    async def run(self) -> None:
        """Watch the chain and fill whoever is to be filled."""
        backoff = Backoff(200 * MS, 2 * SECOND)
        while True:
            view = self._replica.view
            if not (view.serving and view.tail_here and view.successor_syncing):
                backoff.reset()
                await self._replica.view_change()
                continue
            try:
                await self._session(view)
                pause_ns = RECHECK_NS
            except (EmberfsError, OSError) as problem:
                log.warning("filling target %d: %s; tries again", view.successor, problem)
                pause_ns = backoff.next_ns(self._env.random)
            await self._replica.view_change_within(view, pause_ns)

    async def _session(self, view: View) -> None:
        replica = self._replica
        started_ns = self._env.now_ns()
        self._done_bytes, self._total_bytes = 0, replica.store.used_bytes
        await self._tell(view, done=False)
        await replica.settled()
        start, sent = b"", 0
        while True:
            stop, transfers, same_bytes = await self._compare_pages(view, start)
            self._done_bytes += same_bytes
            await self._send_all(view, transfers)
            sent += len(transfers)
            if stop == END:
                break
            start = stop
        self._total_bytes = self._done_bytes
        await self._tell(view, done=True)
        log.info(
            "target %d is filled: %d chunks sent in %.1f s",
            view.successor,
            sent,
            (self._env.now_ns() - started_ns) / SECOND,
        )

    async def _compare_pages(
        self, view: View, start: bytes
    ) -> tuple[bytes, tuple[Transfer, ...], int]:
        """Compare the next page of both inventories; return (stop, transfers, equal bytes)."""
        # Theirs first: what they get meanwhile comes from us, so ours is never the older one.
        theirs = await self._links.list(
            ListRequest(view.successor, start, b"", PAGE_CHUNKS, serving_only=False)
        )
        own, own_next = await self._own_page(start)
        stop = common_end(own_next, theirs.next)
        found = compare(own, theirs.rows, stop)
        return stop, found.transfers, found.same_bytes

    async def _own_page(self, start: bytes) -> tuple[list[ChunkRow], bytes]:
        store = self._replica.store
        return await self._env.run_blocking(lambda: store.list(start, b"", PAGE_CHUNKS))

    async def _send_all(self, view: View, transfers: tuple[Transfer, ...]) -> None:
        """Send some chunks, a few at a time; the first failure ends it."""
        waiting = list(reversed(transfers))

        async def send_some() -> None:
            while waiting:
                await self._send(view, waiting.pop())

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(TRANSFERS_MAX, len(transfers))):
                    group.create_task(send_some())
        except* (EmberfsError, OSError) as problems:
            raise _first(problems) from None

    async def _send(self, view: View, transfer: Transfer) -> None:
        replica, chunk = self._replica, ChunkId(transfer.chunk)
        await self._throttle.pay(transfer.length)
        async with replica.hold(chunk):
            if replica.view != view:
                raise EmberfsError(Code.CHAIN_VERSION, "the chain has changed")
            count = await self._send_held(view, chunk)
        SYNCED_BYTES.inc(count)
        self._done_bytes += count
        if self._env.now_ns() - self._told_ns > PROGRESS_NS:
            await self._tell(view, done=False)

    async def _send_held(self, view: View, chunk: ChunkId) -> int:
        replica = self._replica
        for last_try in (False, True):
            state = replica.store.state(chunk)
            try:
                return await self._sender.send_committed(
                    replica.store, chunk, state, view.successor, view.chain_version
                )
            except EmberfsError as problem:
                if last_try or problem.code != Code.CHECKSUM or replica.repair is None:
                    raise
                await replica.repair(chunk)
        raise AssertionError

    async def _tell(self, view: View, *, done: bool) -> None:
        self._told_ns = self._env.now_ns()
        total_bytes = max(self._total_bytes, self._done_bytes)
        request = SyncRequest(
            view.successor, view.chain_version, done, self._done_bytes, total_bytes
        )
        await self._links.sync(request)


def _first(problems: "BaseExceptionGroup[Exception]") -> Exception:
    found: BaseException = problems
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, Exception)
    return found
