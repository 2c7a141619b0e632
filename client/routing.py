"""The newest routing snapshot, followed on a stream; versions never go back."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from emberfs.proto.cluster import EMPTY_ROUTING, ClusterId, RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, RoutingVersion
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.client.routing")

RETRY_FIRST_NS = 50 * MS
RETRY_MAX_NS = 500 * MS
LATE_NS = 100 * MS  # a stream that lives brings what was published within this

Callback = Callable[[RoutingSnapshot], None]


class RoutingSource(Protocol):
    """Where snapshots come from: client.control.Control, or the simulator."""

    def watch(self, have_version: RoutingVersion) -> AsyncGenerator[RoutingSnapshot, None]:
        """Yield every snapshot that is newer; see Control.watch."""
        ...

    @property
    def watches_another(self) -> bool:
        """Tell whether the stream comes from another mgmtd than the one that answers calls."""
        ...


class Routing:
    """Follows the routing of one cluster, for ever and through restarts of mgmtd."""

    def __init__(self, env: Env, control: RoutingSource) -> None:
        self.snapshot: RoutingSnapshot = EMPTY_ROUTING
        self._env = env
        self._control = control
        self._callbacks: list[Callback] = []
        self._newer = asyncio.Event()  # set and replaced with every newer snapshot
        self._tasks = TaskSet()
        self._problem: EmberfsError | None = None  # why there is no stream just now
        self._failed = asyncio.Event()  # a problem that trying again does not solve
        self._closed = False
        self._streaming: asyncio.Task[EmberfsError] | None = None
        self._overdue: asyncio.Task[None] | None = None

    async def start(self, timeout_ns: int) -> None:
        """Return with the first snapshot. UNREACHABLE, WRONG_CLUSTER: with what to check."""
        self._tasks.spawn(self._follow(), name="routing")
        newer = asyncio.ensure_future(self._newer.wait())
        failed = asyncio.ensure_future(self._failed.wait())
        try:
            await asyncio.wait(
                {newer, failed},
                timeout=timeout_ns / SECOND,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            newer.cancel()
            failed.cancel()
            await asyncio.gather(newer, failed, return_exceptions=True)
        if not self.snapshot.version:
            await self.close()
            raise self._problem or EmberfsError(
                Code.UNREACHABLE, f"no routing from mgmtd within {timeout_ns / SECOND:g} s"
            )

    async def wait_newer(self, than: RoutingVersion, timeout_ns: int) -> bool:
        """Wait until the snapshot is newer than `than`; False when time is up or after close."""
        try:
            async with asyncio.timeout(timeout_ns / SECOND):
                while self.snapshot.version <= than and not self._closed:
                    await self._newer.wait()
        except TimeoutError:
            pass
        return self.snapshot.version > than

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Call `callback` on the event loop with every newer snapshot; returns how to end it."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def expect(self, version: RoutingVersion) -> None:
        """Note that mgmtd has published `version`; a stream from another one may never bring it.

        That one may be frozen or cut off while this one leads, as heartbeats know seconds before
        the stream itself is given up. A stream from the same mgmtd is only slow, and left alone.
        """
        if version > self.snapshot.version and self._overdue is None and not self._closed:
            self._overdue = self._tasks.spawn(self._hurry(version), name="routing is late")

    async def _hurry(self, version: RoutingVersion) -> None:
        try:
            late = not await self.wait_newer(RoutingVersion(version - 1), LATE_NS)
            if late and self._streaming is not None and self._control.watches_another:
                self._streaming.cancel()
        finally:
            self._overdue = None

    async def close(self) -> None:
        """Stop following; the last snapshot stays."""
        self._closed = True
        self._wake()
        await self._tasks.close()

    async def _follow(self) -> None:
        backoff = Backoff(RETRY_FIRST_NS, RETRY_MAX_NS)
        while True:
            streaming = self._tasks.spawn(self._stream(backoff), name="routing stream")
            self._streaming = streaming
            await asyncio.wait({streaming})
            if streaming.cancelled():
                log.info("routing is followed anew: the stream was behind")
                continue
            self._lost(streaming.result())
            await self._env.sleep_ns(backoff.next_ns(self._env.random))

    async def _stream(self, backoff: Backoff) -> EmberfsError:
        """Follow one stream; return why it has ended."""
        stream = self._control.watch(self.snapshot.version)
        try:
            async for snapshot in stream:
                backoff.reset()
                if self._problem is not None and self.snapshot.version:
                    log.info("routing is followed again, version %d", snapshot.version)
                self._problem = None
                self.offer(snapshot)
        except EmberfsError as problem:
            return problem
        finally:
            await stream.aclose()
        return EmberfsError(Code.UNREACHABLE, "mgmtd ended the routing stream")

    def _lost(self, problem: EmberfsError) -> None:
        """Log the first failure in a row, not its repetitions."""
        known, self._problem = self._problem, problem
        if problem.code in (Code.WRONG_CLUSTER, Code.CONFIG):
            self._failed.set()
        if self.snapshot.version and (known is None or known.code != problem.code):
            log.warning("routing version %d may be old: %s", self.snapshot.version, problem)

    def offer(self, snapshot: RoutingSnapshot) -> bool:
        """Adopt a snapshot if it is newer. WRONG_CLUSTER if it is of another cluster."""
        known = self.snapshot
        ours = ClusterId(known.cluster, known.identity)
        theirs = ClusterId(snapshot.cluster, snapshot.identity)
        if known.version and theirs.differs(ours):
            raise EmberfsError(
                Code.WRONG_CLUSTER,
                f"mgmtd now serves cluster {theirs.beside(ours)} instead of {ours.beside(theirs)}; "
                "start the right mgmtd, or this process anew",
            )
        if snapshot.version <= known.version:
            if snapshot.version < known.version:
                log.warning("refused routing version %d after %d", snapshot.version, known.version)
            return False
        self.snapshot = snapshot
        self._wake()
        for callback in list(self._callbacks):
            try:
                callback(snapshot)
            except Exception:
                log.exception("a subscriber to the routing failed")
        return True

    def _wake(self) -> None:
        self._newer.set()
        self._newer = asyncio.Event()
