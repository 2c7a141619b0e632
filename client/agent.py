"""Keeps a process registered with mgmtd: heartbeats, and the lease that fences it off.

Self-fencing: mgmtd declares a node dead a full lease after its last heartbeat arrived; the node
itself stops at half a lease after its last acknowledged heartbeat was sent, hence always earlier.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from emberfs.client.connection import Lease
from emberfs.proto.cluster import Node, NodeKind, TargetReport
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, NodeId, RoutingVersion
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.client.agent")

RETRY_FIRST_NS = 50 * MS
RETRY_MAX_NS = 500 * MS
HEARTBEAT_NS = 1 * SECOND  # until mgmtd has said otherwise

Reports = Callable[[], Sequence[TargetReport]]


class Registrar(Protocol):
    """Who is registered with: client.control.Control, or the simulator."""

    async def register(self, node: Node, reports: Sequence[TargetReport]) -> Lease:
        """Announce a process; see Control.register."""
        ...

    async def heartbeat(
        self,
        node_id: NodeId,
        kind: NodeKind,
        incarnation: int,
        reports: Sequence[TargetReport],
        client: int = 0,
    ) -> Lease:
        """Renew the lease; see Control.heartbeat."""
        ...


class Agent:
    """One process's membership in the cluster."""

    def __init__(
        self,
        env: Env,
        control: Registrar,
        node: Node,
        reports: Reports = lambda: (),
        expect: Callable[[RoutingVersion], None] = lambda _: None,
    ) -> None:
        """`reports` is asked before every heartbeat and names all targets of the process.

        `expect` is told which version of the routing mgmtd is at (see Routing.expect).
        """
        self.node = node
        self._env = env
        self._control = control
        self._reports = reports
        self._expect = expect
        self._heartbeat_ns = HEARTBEAT_NS
        self._valid_until_ns = 0
        self._dead_from_ns = 0
        self.lease_ns = 0  # as mgmtd granted it last
        self.lapses = 0  # how often the lease had run out, all of it, before it was renewed
        # Routing that must have arrived before this node may serve: while the lease had lapsed,
        # somebody else may have been put in its place.
        self.needs_version = RoutingVersion(0)
        self.told_version = RoutingVersion(0)  # what mgmtd was at when it answered last
        self._soon = asyncio.Event()
        self._tasks = TaskSet()
        self._problem: EmberfsError | None = None

    async def start(self, timeout_ns: int) -> None:
        """Register, trying again while mgmtd does not answer, then keep the lease.

        EmberfsError: UNREACHABLE when time is up; WRONG_CLUSTER, NODE_ID_TAKEN, INVALID at once.
        """
        deadline_ns = self._env.now_ns() + timeout_ns
        backoff = Backoff(RETRY_FIRST_NS, RETRY_MAX_NS)
        while True:
            try:
                await self._register()
                break
            except EmberfsError as problem:
                if problem.code != Code.UNREACHABLE:
                    raise
                if self._env.now_ns() >= deadline_ns:
                    raise EmberfsError(
                        problem.code, f"gave up after {timeout_ns / SECOND:g} s: {problem.message}"
                    ) from None
            await self._env.sleep_ns(backoff.next_ns(self._env.random))
        self._tasks.spawn(self._live(), name="heartbeat")

    async def close(self) -> None:
        """Stop renewing: mgmtd declares the process dead when the lease has run out."""
        self._valid_until_ns = 0
        await self._tasks.close()

    def lease_ok(self) -> bool:
        """Tell whether nobody else can have been put in our place yet."""
        return self._env.now_ns() < self._valid_until_ns

    def is_member(self) -> bool:
        """Tell whether mgmtd cannot have declared us dead yet."""
        return self._env.now_ns() < self._dead_from_ns

    def beat_soon(self) -> None:
        """Send the next heartbeat at once: a report has changed."""
        self._soon.set()

    async def _live(self) -> None:
        while True:
            # While mgmtd is lost, twice the rate: a restarted one must hear us well before the
            # lease that it grants everybody at its start runs out.
            pause_ns = self._heartbeat_ns // (2 if self._problem else 1)
            try:
                async with asyncio.timeout(pause_ns / SECOND):
                    await self._soon.wait()
            except TimeoutError:
                pass
            self._soon.clear()
            try:
                await self._beat()
            except EmberfsError as problem:
                self._lost(problem)
                if self._soon.is_set():  # it is lost anyway: keep the rate
                    await self._env.sleep_ns(pause_ns)

    async def _beat(self) -> None:
        sent_ns = self._env.now_ns()
        node = self.node
        try:
            lease = await self._control.heartbeat(
                node.id, node.kind, node.incarnation, self._reports(), node.client
            )
            self._renewed(lease, sent_ns)
        except EmberfsError as problem:
            if problem.code != Code.NOT_REGISTERED:
                raise
            await self._register()
            log.info("registered again as node %d", node.id)

    async def _register(self) -> None:
        sent_ns = self._env.now_ns()
        self._renewed(await self._control.register(self.node, self._reports()), sent_ns)

    def _renewed(self, lease: Lease, sent_ns: int) -> None:
        if self._problem is not None:
            log.info("mgmtd answers again; the lease is renewed")
            self._problem = None
        if not self.lease_ok():
            self.needs_version = lease.version
        self._heartbeat_ns = max(lease.heartbeat_ns, 1 * MS)
        self.lease_ns = lease.lease_ns
        self._valid_until_ns = sent_ns + lease.lease_ns // 2
        if self._dead_from_ns and sent_ns >= self._dead_from_ns:
            self.lapses += 1
        self._dead_from_ns = sent_ns + lease.lease_ns
        self.told_version = lease.version
        self._expect(lease.version)

    def _lost(self, problem: EmberfsError) -> None:
        """Log the first failure in a row, not its repetitions."""
        if problem.code in (Code.NODE_ID_TAKEN, Code.WRONG_CLUSTER):
            self._valid_until_ns = 0  # another process may be in our place already
        if self._problem is None or self._problem.code != problem.code:
            log.warning("heartbeat of node %d failed: %s", self.node.id, problem)
        self._problem = problem
