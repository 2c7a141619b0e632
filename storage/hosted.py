"""One target of this process: open or not, with what its heartbeats say."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from emberfs.fabric.buffers import BufferPool
from emberfs.kv.store import OrderedStore
from emberfs.proto.cluster import Chain, ChainTarget, PublicState, RoutingSnapshot, TargetReport
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import SECOND, ChainVersion, TargetId
from emberfs.proto.storage_calls import SyncRequest
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.storage.chunks import ChunkStore, open_rocks
from emberfs.storage.diskwatch import HANGS_NS
from emberfs.storage.filling import Recovery, Throttle
from emberfs.storage.forward import Sender
from emberfs.storage.links import Links
from emberfs.storage.metrics import DAMAGED_NOW, LOCAL_STATE, PUBLIC_STATE, RECOVERY, USED_BYTES
from emberfs.storage.repair import Repairer
from emberfs.storage.replica import TargetReplica
from emberfs.storage.scrub import Scrubber, ScrubSettings
from emberfs.storage.target import (
    Closed,
    Condition,
    DiskFailed,
    Opened,
    RoutingChanged,
    TargetState,
    Ticked,
    Unwanted,
)
from emberfs.storage.view import view_of

log = logging.getLogger("emberfs.storage.hosted")

NO_SYNC = SyncRequest(TargetId(0), ChainVersion(0), done=False)
TICK_NS = SECOND
FLUSH_EVERY_NS = 2 * SECOND
FLUSH_LOOK_NS = SECOND // 5


FILLED = "filled"  # a file in the directory of a target: was it ever complete?
NOT_YET = b"not yet\n"
REOPEN_FIRST_NS = 5 * SECOND  # after a disk error, before the target is opened again
REOPEN_MAX_NS = 300 * SECOND


class _Open(Protocol):
    def __call__(self, *, distrust: bool) -> Awaitable[None]: ...


async def _not_opened(*, distrust: bool) -> None:
    raise AssertionError("open comes first")


class HostedTarget:
    """A target id, its directory, and once it is open its replica."""

    def __init__(
        self,
        env: Env,
        target: TargetId,
        path: str,
        *,
        capacity_bytes: int = 0,
        open_store: Callable[[str], OrderedStore] = open_rocks,
    ) -> None:
        self.target = target
        self.path = path
        self.state = TargetState(target)
        self.replica: TargetReplica | None = None
        self.store: ChunkStore | None = None
        self.sync: SyncRequest | None = None  # what our predecessor last said of our recovery
        self._env = env
        self._capacity_bytes = capacity_bytes
        self._open_store = open_store
        self._sharers = 1
        self._open_again: _Open = _not_opened
        self._unfilled = False  # the directory says that it was never complete
        self._doubtful = False  # it says that something may be missing
        self._scrubber: Scrubber | None = None

    def apply(self, snapshot: RoutingSnapshot) -> None:
        """Take over routing."""
        chain = chain_of_target(snapshot, self.target)
        status = snapshot.targets.get(self.target)
        if self.replica is not None:
            self.replica.settle(Unwanted(status.unwanted if status is not None else ""))
            self.replica.apply_chain(chain)
            if self._is_complete_now():
                self.replica.tasks.spawn(self._note_complete(), name="note: complete")
        else:
            event = RoutingChanged(view_of(chain, self.target))
            self.state.handle(event, self._env.now_ns())
        PUBLIC_STATE.labels(self.target).set(self.state.published.public)

    async def open(
        self,
        links: Links,
        buffers: BufferPool,
        repairer: Repairer,
        report_now: Callable[[], None],
        *,
        throttle: Throttle,
        sharers: int,
        scrub: ScrubSettings,
        lease_ok: Callable[[], bool],
    ) -> None:
        """Open the store; a failure is reported as OFFLINE with its reason, not raised.

        `sharers`: how many targets use the same file system. Routing must have been applied.
        """
        self._sharers = max(1, sharers)
        self._open_again = partial(
            self._open, links, buffers, repairer, report_now, throttle, scrub, lease_ok
        )
        await self._open_again(distrust=False)

    async def _open(
        self,
        links: Links,
        buffers: BufferPool,
        repairer: Repairer,
        report_now: Callable[[], None],
        throttle: Throttle,
        scrub: ScrubSettings,
        lease_ok: Callable[[], bool],
        *,
        distrust: bool,
    ) -> None:
        env, path = self._env, self.path
        try:
            blank = await env.run_blocking(lambda: note_blank(env, path))
            capacity = self._capacity_bytes
            store = await env.run_blocking(
                lambda: ChunkStore.open(
                    env,
                    path,
                    open_store=self._open_store,
                    capacity_bytes=capacity,
                    distrust=distrust,
                )
            )
            life = await env.run_blocking(lambda: next_life(env, path))
        except (EmberfsError, OSError) as problem:
            log.error("target %d cannot be opened: %s", self.target, problem)
            self.state.handle(DiskFailed(f"cannot be opened: {problem}"), env.now_ns())
            return
        self.store = store
        sender = Sender(env, self.target, links, buffers, life)
        replica = TargetReplica(env, store, sender, self.state, report_now)
        replica.repair = lambda chunk: repairer.repair(replica, chunk)
        self.replica = replica
        self._unfilled = blank
        doubtful = self._doubtful = store.power_cut_possible or distrust
        replica.settle(Opened(doubtful=doubtful, blank=blank))
        recovery = Recovery(env, replica, sender, links, throttle)
        replica.tasks.spawn(recovery.run(), name=f"recovery of target {self.target}'s successor")
        self._scrubber = Scrubber(
            env, path, replica, sender, links, repairer, scrub, lease_ok=lease_ok
        )
        replica.tasks.spawn(self._scrubber.run(), name="scrub")
        replica.tasks.spawn(self._tick(replica), name="passing of time")
        replica.tasks.spawn(self._flush_now_and_then(replica), name="background flush")

    async def keep_open(self, changed: Callable[[], None]) -> None:
        """Open a failed target again and again, for ever; what it then holds is doubtful.

        `changed` is called when the replica has gone or has come.
        """
        env, backoff = self._env, Backoff(REOPEN_FIRST_NS, REOPEN_MAX_NS)
        while True:
            await env.sleep_ns(TICK_NS)
            if self.state.condition == Condition.UPTODATE:
                backoff.reset()
            if self.state.condition != Condition.FAILED:
                continue
            await env.sleep_ns(backoff.next_ns(env.random))
            log.info("target %d is opened again", self.target)
            await self._close_failed()
            changed()
            self.state.handle(Closed(), env.now_ns())
            await self._open_again(distrust=True)
            changed()

    async def _close_failed(self) -> None:
        try:
            await self.close()
        except (EmberfsError, OSError) as problem:
            log.error("target %d: closing: %s", self.target, problem)
            self.replica = self.store = self._scrubber = None

    async def close(self) -> None:
        """Stop, and close the store."""
        if self.replica is not None:
            await self.replica.close()
        if self.store is not None:
            await self._env.run_blocking(self.store.close)
        self.replica = self.store = self._scrubber = None

    def report(self) -> TargetReport:
        """What heartbeats say."""
        used, capacity = self._space()
        damaged = len(self.store.damaged) if self.store is not None else 0
        syncing = self.state.published.public == PublicState.SYNCING
        sync = self.sync
        if not syncing or sync is None or sync.chain_version != self.state.published.chain_version:
            sync = NO_SYNC
        self._show(sync)
        scrubber = self._scrubber
        LOCAL_STATE.labels(self.target).set(self.state.local)
        USED_BYTES.labels(self.target).set(used)
        DAMAGED_NOW.labels(self.target).set(damaged)
        return TargetReport(
            target=self.target,
            local=self.state.local,
            chain_version=self.state.published.chain_version,
            used_bytes=used,
            capacity_bytes=capacity,
            reason=self.state.reason,
            sync_done_bytes=sync.done_bytes,
            sync_total_bytes=sync.total_bytes,
            sync_done_chunks=sync.done_chunks,
            sync_total_chunks=sync.total_chunks,
            sync_bytes_per_s=sync.bytes_per_s,
            sync_source=sync.source,
            sync_problem=self.state.sync_problem,
            damaged_chunks=damaged,
            scrub_percent=scrubber.percent if scrubber is not None else 0,
            scrub_finished_s=scrubber.note.finished_s if scrubber is not None else 0,
            scrub_findings=scrubber.findings if scrubber is not None else 0,
            doubtful=self.state.doubtful,
        )

    def _show(self, sync: SyncRequest) -> None:
        for what, value in (
            ("done_bytes", sync.done_bytes),
            ("total_bytes", sync.total_bytes),
            ("done_chunks", sync.done_chunks),
            ("total_chunks", sync.total_chunks),
            ("bytes_per_s", sync.bytes_per_s),
        ):
            RECOVERY.labels(self.target, what).set(value)

    def _space(self) -> tuple[int, int]:
        if self.store is None:
            return 0, 0
        used = self.store.used_bytes
        try:
            capacity = self.store.capacity_bytes
        except OSError as problem:
            if self.replica is not None:
                self.replica.fail(f"statvfs: {problem}")
            return used, used
        if not self._capacity_bytes:
            capacity = used + max(0, capacity - used) // self._sharers
        return used, capacity

    async def _tick(self, replica: TargetReplica) -> None:
        while True:
            if self._is_complete_now():
                await self._note_complete()
            await self._env.sleep_ns(TICK_NS)
            if replica.flusher.watch.hangs:
                replica.fail(f"its disk has not answered for {HANGS_NS // SECOND} s")
            replica.settle(Ticked())

    def _is_complete_now(self) -> bool:
        """Tell whether the directory says that it is not, and is wrong."""
        return (self._unfilled or self._doubtful) and self.state.condition == Condition.UPTODATE

    async def _note_complete(self) -> None:
        """From now on the directory is known to have been complete once, and to miss nothing."""
        path, disk, store = f"{self.path}/{FILLED}", self._env.disk, self.store
        unfilled, doubtful = self._unfilled, self._doubtful
        self._unfilled = self._doubtful = False

        def note() -> None:
            if unfilled:
                disk.replace_small(path, b"yes\n")
            if doubtful and store is not None:
                store.trust()

        try:
            await self._env.run_blocking(note)
        except OSError as problem:
            self._unfilled, self._doubtful = unfilled, doubtful
            log.error("target %d: %s", self.target, problem)

    async def _flush_now_and_then(self, replica: TargetReplica) -> None:
        last_ns = self._env.now_ns()
        while True:
            await self._env.sleep_ns(FLUSH_LOOK_NS)
            due = self._env.now_ns() - last_ns >= FLUSH_EVERY_NS
            if replica.store.need_flush or (due and replica.flusher.dirty):
                last_ns = self._env.now_ns()
                try:
                    await replica.flush()
                except EmberfsError as problem:
                    log.error("target %d: background flush: %s", self.target, problem)


def note_blank(env: Env, path: str) -> bool:
    """Tell whether the directory was never complete: empty, or not filled since. Blocks. OSError.

    It stays so over restarts: the last replica that the chain knows may have been on another disk.
    """
    disk = env.disk
    if disk.exists(f"{path}/format"):
        return disk.exists(f"{path}/{FILLED}") and disk.read_small(f"{path}/{FILLED}") == NOT_YET
    disk.make_directory(path)
    disk.replace_small(f"{path}/{FILLED}", NOT_YET)
    return True


def next_life(env: Env, path: str) -> int:
    """Count the starts of a target, durably. Blocks. Raises OSError."""
    try:
        last = int(env.disk.read_small(f"{path}/life"))
    except (FileNotFoundError, ValueError):
        last = 0
    env.disk.replace_small(f"{path}/life", b"%d\n" % (last + 1))
    return last + 1


def chain_of_target(snapshot: RoutingSnapshot, target: TargetId) -> Chain | None:
    """Return the chain that a target belongs to."""
    status = snapshot.targets.get(target)
    chain = snapshot.chains.get(status.chain) if status is not None else None
    if chain is not None and _has(chain.targets, target):
        return chain
    return next((c for c in snapshot.chains.values() if _has(c.targets, target)), None)


def _has(members: tuple[ChainTarget, ...], target: TargetId) -> bool:
    return any(member.target == target for member in members)
