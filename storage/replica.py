"""One target's part in its chain: performs what the pure machines decide.

    who                        owns the chunk       may run beside it
    update, leftover           from begin to end    reads
    hold (transfer, repair)    until released       reads

The store is changed only by whoever owns the chunk. Reads never wait for the lock, only (where
readrule.py says so) for the operation in work to be committed. After every `await` the state of a
chunk is fetched anew. Crash windows are those between two effects of craq.py.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Container
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from emberfs.fabric.region import Slice
from emberfs.proto.cluster import Chain
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, ChainVersion, ChunkId
from emberfs.proto.storage_calls import UpdateAnswer, UpdateRequest
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet
from emberfs.storage import chunk_events as ev
from emberfs.storage import target as condition
from emberfs.storage.craq import ChunkMachine
from emberfs.storage.forward import OwnDamageError, Sender
from emberfs.storage.group_flush import GroupFlush
from emberfs.storage.metrics import FORWARD_FAILURES
from emberfs.storage.storeface import Store
from emberfs.storage.view import View, view_of

log = logging.getLogger("emberfs.storage.replica")

NEWER_CHAIN_WAIT_NS = 300 * MS  # how long a request may be ahead of our routing
HOLD_NS = 60 * SECOND  # how long recovery and repair wait for an update of a chunk to end


class _Waiter:
    """Somebody who waits for an operation, with the payload that it may use meanwhile."""

    __slots__ = ("chain_version", "done", "sending", "source")

    def __init__(self, source: Slice | None) -> None:
        self.chain_version = ChainVersion(0)  # of our view when it was done
        self.done: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        self.source = source
        self.sending: asyncio.Task[None] | None = None  # may still read the source


class _Active:
    """A chunk with operations on it."""

    __slots__ = ("chunk", "forward", "machine", "pause", "removals", "watchers")

    def __init__(self, chunk: ChunkId, machine: ChunkMachine) -> None:
        self.chunk = chunk
        self.machine = machine
        self.removals = 0  # how often the chunk went while this stands
        self.forward: asyncio.Task[None] | None = None
        self.pause: asyncio.Task[None] | None = None
        self.watchers: list[asyncio.Future[None]] = []  # told when the store's state moves


class TargetReplica:
    """All chunks of one open target."""

    def __init__(
        self,
        env: Env,
        store: Store,
        sender: Sender,
        state: condition.TargetState,
        report_now: Callable[[], None],
    ) -> None:
        self.env = env
        self.store = store
        self.state = state
        self.target = state.target
        self.tasks = TaskSet()
        self.flusher = GroupFlush(env, self._flush_store, self.tasks)
        self.repair: Callable[[ChunkId], Any] | None = None  # set by repair.py
        self._sender = sender
        self._report_now = report_now
        self._active: dict[ChunkId, _Active] = {}
        self._waiters: dict[int, _Waiter] = {}
        self._keys = 0
        self._leftover: set[ChunkId] = set(store.pending_chunks())
        self._finishing: set[ChunkId] = set()  # of them, those that a task rolls forward
        self._view_changed = asyncio.Event()
        self._closed = False

    # -------------------------------------------------------- the target as a whole

    @property
    def view(self) -> View:
        """The chain as this target may act on it."""
        return self.state.view

    def settle(self, event: condition.Event) -> None:
        """Let something happen to the target."""
        for effect in self.state.handle(event, self.env.now_ns()):
            match effect:
                case condition.ViewChanged():
                    self._apply_view(effect.view)
                case condition.FinishLeftovers():
                    for chunk in sorted(self._leftover - self._finishing):
                        self._finishing.add(chunk)
                        self.tasks.spawn(self._finish_quietly(chunk), name="leftover")
                case condition.ReportNow():
                    self._report_now()

    def apply_chain(self, chain: Chain | None) -> None:
        """Take over what routing says of our chain."""
        self.settle(condition.RoutingChanged(view_of(chain, self.target)))

    def fail(self, reason: str) -> None:
        """Take the target out of service for good; its data stays as it is."""
        if self.state.condition != condition.Condition.FAILED:
            log.error("target %d goes offline: %s", self.target, reason)
            self.settle(condition.DiskFailed(reason))

    def withdraw(self, reason: str) -> None:
        """Leave the chain for a while, to be filled again by who is complete."""
        log.error("target %d leaves its chain: %s", self.target, reason)
        self.settle(condition.Withdrew(reason))

    def _apply_view(self, view: View) -> None:
        log.info(
            "target %d: chain %d version %d, %s%s, successor %d",
            view.target,
            view.chain,
            view.chain_version,
            view.public.name,
            " head" if view.head else "",
            view.successor,
        )
        self._view_changed.set()
        self._view_changed = asyncio.Event()
        for active in list(self._active.values()):
            self._feed(active, ev.RoutingChanged(view))

    async def catch_up(self, chain_version: ChainVersion) -> None:
        """Wait a moment for routing that a request has seen and we have not."""
        deadline_ns = self.env.now_ns() + NEWER_CHAIN_WAIT_NS
        while chain_version > self.view.chain_version and self.view.chain_version:
            left_ns = deadline_ns - self.env.now_ns()
            if left_ns <= 0:
                return
            await self.view_change_within(self.view, left_ns)

    async def view_change(self) -> None:
        """Wait until the view is another one."""
        await self._view_changed.wait()

    async def view_change_within(self, view: View, timeout_ns: int) -> None:
        """Wait until the view differs from `view`, but not longer than `timeout_ns`."""
        if self.view != view:
            return
        try:
            async with asyncio.timeout(timeout_ns / SECOND):
                await self._view_changed.wait()
        except TimeoutError:
            pass

    async def close(self) -> None:
        """Stop all work; whoever waits gets SHUTTING_DOWN. Nothing durable is lost."""
        self._closed = True
        await self.tasks.close()  # threads may still use the payload of who waits
        for waiter in list(self._waiters.values()):
            if not waiter.done.done():
                waiter.done.set_exception(_shutting_down())
                waiter.done.exception()  # seen, even if its owner has gone
        for active in self._active.values():
            self._tell(active)
        self._active.clear()

    # -------------------------------------------------------- what others ask for

    async def update(self, request: UpdateRequest, source: Slice | None) -> UpdateAnswer:
        """Perform one verified update. Raises the request's own errors."""
        if self._closed:
            raise _shutting_down()
        key, waiter = self._enter(source)
        try:
            self._arrive(request.chunk, ev.UpdateArrived(key, request))
            if waiter.done.done():
                version, length = waiter.done.result()
            else:
                version, length = await self._outcome(request.chunk, key, waiter)
            # Not of the view as it is by now: that chain may have lost what was done in this one.
            return UpdateAnswer(version, length, waiter.chain_version)
        finally:
            del self._waiters[key]

    async def _outcome(self, chunk: ChunkId, key: int, waiter: _Waiter) -> tuple[int, int]:
        """Wait; when cancelled, stay as long as the payload is in use."""
        cancelled: asyncio.CancelledError | None = None
        while not waiter.done.done():
            try:
                await asyncio.wait([waiter.done])
            except asyncio.CancelledError as problem:
                cancelled = problem
                if chunk in self._active:
                    self._feed(self._active[chunk], ev.Abandoned(key))
        while waiter.sending is not None and not waiter.sending.done():
            try:
                await asyncio.wait([waiter.sending])
            except asyncio.CancelledError as problem:
                cancelled = problem
        if cancelled is not None:
            waiter.done.exception()
            raise cancelled
        return waiter.done.result()

    async def finish(self, chunk: ChunkId) -> None:
        """Wait until the version that is pending now is committed. Raises why it cannot be."""
        active = self._active.get(chunk)
        if active is None or chunk in self._leftover:
            await self._ask(chunk, ev.ResumeArrived)
            return
        watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        active.watchers.append(watcher)
        await watcher

    async def _finish_quietly(self, chunk: ChunkId) -> None:
        try:
            await self._ask(chunk, ev.ResumeArrived)
        except EmberfsError as problem:
            log.warning("target %d: a pending chunk stays so for now: %s", self.target, problem)
        finally:
            self._finishing.discard(chunk)

    async def _ask(self, chunk: ChunkId, event: type[ev.ResumeArrived]) -> None:
        key, waiter = self._enter(None)
        try:
            self._arrive(chunk, event(key))
            await waiter.done
        except asyncio.CancelledError:
            if chunk in self._active:
                self._feed(self._active[chunk], ev.Abandoned(key))
            raise
        finally:
            del self._waiters[key]

    @asynccontextmanager
    async def hold(self, chunk: ChunkId) -> AsyncIterator[None]:
        """Own a chunk: nothing changes it meanwhile. BUSY if an update of it does not end."""
        key, waiter = self._enter(None)
        try:
            self._arrive(chunk, ev.HoldArrived(key))
            if not waiter.done.done():
                await self._granted(waiter)
            waiter.done.result()
            yield
        finally:
            del self._waiters[key]
            if chunk in self._active:
                self._feed(self._active[chunk], ev.Abandoned(key))

    async def _granted(self, waiter: _Waiter) -> None:
        """Wait for a hold; an update may wait for its successor as long as an outage lasts."""
        await asyncio.wait([waiter.done], timeout=HOLD_NS / SECOND)
        if not waiter.done.done():
            text = f"an update of the chunk has not ended for {HOLD_NS // SECOND} s"
            raise EmberfsError(Code.BUSY, text)

    async def settled(self) -> None:
        """Wait until every operation that is in work now has ended. BUSY if one does not."""
        for chunk in list(self._active):
            async with self.hold(chunk):
                pass

    @property
    def has_leftovers(self) -> bool:
        """Whether some chunk has a pending version that no operation owns."""
        # A hold may have come right behind the operation that lost its place.
        active = self._active.values()
        return bool(self._leftover) or any(one.machine.has_leftover for one in active)

    @property
    def in_work(self) -> tuple[Container[ChunkId], Container[ChunkId]]:
        """Chunks that a read must look closer at: operations in work, or a leftover."""
        return self._active, self._leftover

    def is_exposed(self, chunk: ChunkId) -> bool:
        """Whether the pending version may be committed elsewhere."""
        active = self._active.get(chunk)
        return active.machine.exposed if active is not None else chunk in self._leftover

    def life_of(self, chunk: ChunkId) -> tuple[object, int]:
        """Two equal answers: the chunk was not removed in between, its versions mean the same.

        After a removal they begin anew, so that a number alone may name another content.
        """
        active = self._active.get(chunk)
        return active, active.removals if active is not None else 0

    @property
    def active_count(self) -> int:
        """Chunks with operations in work."""
        return len(self._active)

    # -------------------------------------------------------- feeding the machines

    def _enter(self, source: Slice | None) -> tuple[int, _Waiter]:
        if self._closed:
            raise _shutting_down()
        self._keys += 1
        waiter = self._waiters[self._keys] = _Waiter(source)
        return self._keys, waiter

    def _arrive(self, chunk: ChunkId, event: ev.Event) -> None:
        active = self._active.get(chunk)
        if active is None:
            state = self.store.state(chunk)
            absent = state is None or not state.version
            tombstone = self.store.tombstone(chunk) if absent else ()
            machine = ChunkMachine(self.view, state, tombstone)
            active = self._active[chunk] = _Active(chunk, machine)
        self._feed(active, event)

    def _feed(self, active: _Active, event: ev.Event | None) -> None:
        """Let the machine handle an event and whatever follows from it at once."""
        events: deque[ev.Event] = deque()
        while event is not None:
            if self._closed:
                return
            for effect in active.machine.handle(event, self.env.now_ns()):
                follows = self._perform(active, effect)
                if follows is not None:
                    events.append(follows)
            event = events.popleft() if events else None
        if active.machine.idle and self._active.get(active.chunk) is active:
            self._retire(active)

    def _retire(self, active: _Active) -> None:
        """Forget a machine without work; keep what outlives it."""
        machine, chunk = active.machine, active.chunk
        del self._active[chunk]
        if machine.state is not None and machine.state.pending is not None:
            self._leftover.add(chunk)
        else:
            self._leftover.discard(chunk)
        self._tell(active)

    def _tell(self, active: _Active) -> None:
        for watcher in active.watchers:
            if not watcher.done():
                watcher.set_result(None)
        active.watchers.clear()

    def _perform(self, active: _Active, effect: ev.Effect) -> ev.Event | None:
        """Do what the machine wants; return what follows at once."""
        match effect:
            case ev.Prepare():
                return self._prepare(active, effect)
            case ev.Forward():
                self._forward(active, effect)
            case ev.Commit():
                return self._step(active, partial(self.store.commit, active.chunk, effect.version))
            case ev.Reply():
                self._reply(effect)
            case ev.Granted():
                waiter = self._waiters.get(effect.key)
                if waiter is not None and not waiter.done.done():
                    waiter.done.set_result((0, 0))
            case ev.Discard():
                return self._discard(active)
            case ev.CancelForward():
                if active.forward is not None:
                    active.forward.cancel()
            case ev.Pause():
                active.pause = self.tasks.spawn(self._pause(active, effect), name="forward again")
            case ev.Repair():
                self.tasks.spawn(self._repair(active), name="repair before update")
        return None

    def _reply(self, reply: ev.Reply) -> None:
        waiter = self._waiters.get(reply.key)
        if waiter is None or waiter.done.done():
            return
        waiter.chain_version = self.view.chain_version
        if reply.code is None:
            waiter.done.set_result((reply.version, reply.length))
        else:
            waiter.done.set_exception(EmberfsError(reply.code, reply.message))

    # -------------------------------------------------------- the store

    def _prepare(self, active: _Active, effect: ev.Prepare) -> ev.Event | None:
        request = effect.request
        waiter = self._waiters.get(effect.key)
        source = waiter.source if waiter is not None else None
        work = partial(
            self.store.prepare_and_commit if effect.commit else self.store.prepare,
            active.chunk,
            request.kind,
            version=effect.version,
            offset=request.offset,
            length=request.length,
            data=source.view if source is not None else None,
            chunk_bytes=request.chunk_bytes,
            remembered=effect.remembered,
            replace_exists=request.exists,
            checksums=request.checksums,
        )
        if self.store.is_quick(
            request.kind, request.length, chunk=active.chunk, offset=request.offset
        ):
            return self._step(active, work)
        self.tasks.spawn(self._step_in_thread(active, work), name="prepare")
        return None

    def _step(self, active: _Active, work: Callable[[], None]) -> ev.Event:
        """Change the store here and now; return what became of it."""
        try:
            work()
            return self._store_changed(active)
        except Exception as problem:
            return self._store_failed(active, problem)

    async def _step_in_thread(self, active: _Active, work: Callable[[], None]) -> None:
        try:
            await self.flusher.watch.run(work)
            event = self._store_changed(active)
        except Exception as problem:
            event = self._store_failed(active, problem)
        self._feed(active, event)

    def _store_changed(self, active: _Active) -> ev.Event:
        state = self.store.state(active.chunk)
        tombstone = self.store.tombstone(active.chunk) if state is None else ()
        self._leftover.discard(active.chunk)
        if state is not None and state.pending is not None:
            return ev.Prepared(state)
        self.flusher.dirty = True
        active.removals += state is None
        self._tell(active)
        return ev.Committed(state, tombstone)

    def _store_failed(self, active: _Active, problem: Exception) -> ev.Event:
        if not isinstance(problem, EmberfsError):
            log.exception("target %d: the store failed", self.target, exc_info=problem)
            problem = EmberfsError(Code.DISK, f"{type(problem).__name__}: {problem}")
        code = problem.code
        if code == Code.NO_SPACE and not self.view.serving:
            # A target in recovery that is full must not refuse what its chain can hold.
            code = Code.DISK
        if code == Code.DISK:
            asyncio.get_running_loop().call_soon(self.fail, problem.message)
        return ev.StoreFailed(self.store.state(active.chunk), code, problem.message)

    def _discard(self, active: _Active) -> ev.Event:
        try:
            self.store.discard(active.chunk)
        except Exception as problem:
            return self._store_failed(active, problem)
        self._leftover.discard(active.chunk)
        self._tell(active)
        return ev.Discarded(self.store.state(active.chunk))

    def _flush_store(self) -> None:
        self.store.flush()

    async def flush(self) -> None:
        """Make everything committed so far stable. A failure takes the target out of service."""
        try:
            await self.flusher.flush()
        except EmberfsError as problem:
            if problem.code == Code.DISK:
                self.fail(problem.message)
            raise
        except OSError as problem:
            self.fail(f"flush: {problem}")
            raise EmberfsError(Code.DISK, f"flush: {problem}") from None

    # -------------------------------------------------------- the successor

    def _forward(self, active: _Active, effect: ev.Forward) -> None:
        waiter = self._waiters.get(effect.key)
        source = waiter.source if waiter is not None else None
        work = self._send(active, effect, source)
        active.forward = self.tasks.spawn(work, name="forward")
        if waiter is not None:
            waiter.sending = active.forward

    async def _send(self, active: _Active, effect: ev.Forward, source: Slice | None) -> None:
        try:
            if effect.whole or effect.request is None:
                # Behind the tail nobody is complete: better damaged there than in the way for ever.
                await self._sender.send_pending(
                    self.store, active.chunk, effect, last_copy=self.view.tail_here
                )
            else:
                await self._sender.send_change(effect, source)
        except OwnDamageError as problem:
            # The successors are complete and can end this update; we cannot.
            self.withdraw(f"an update meets damage that only others can mend: {problem.message}")
            event: ev.Event = ev.ForwardFailed(effect.attempt, problem.code, problem.message)
        except EmberfsError as problem:
            FORWARD_FAILURES.labels(problem.code.name).inc()
            event = ev.ForwardFailed(effect.attempt, problem.code, problem.message)
        except OSError as problem:
            event = ev.ForwardFailed(effect.attempt, Code.DISCONNECTED, str(problem))
        else:
            event = ev.ForwardAnswered(effect.attempt)
        self._feed(active, event)

    async def _pause(self, active: _Active, effect: ev.Pause) -> None:
        await self.env.sleep_ns(effect.duration_ns)
        self._feed(active, ev.RetryDue(effect.attempt))

    async def _repair(self, active: _Active) -> None:
        message = "no other replica can repair it"
        healed = False
        if self.repair is not None:
            try:
                await self.repair(active.chunk)
                healed = True
            except EmberfsError as problem:
                message = problem.message
        self._feed(active, ev.Repaired(self.store.state(active.chunk), healed, message))


def _shutting_down() -> EmberfsError:
    return EmberfsError(Code.SHUTTING_DOWN, "the storage service stops")
