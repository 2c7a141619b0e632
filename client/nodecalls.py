"""Calls to a node by id, given up the moment routing says that they are pointless.

A server that was cut off or stopped answers nothing for a long time; mgmtd knows after its lease.
So a pending call ends as DISCONNECTED as soon as a newer snapshot shows its node dead, restarted,
or (where the caller says so) no longer in charge.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from emberfs.fabric.call import Peer, Reply, Started
from emberfs.fabric.region import Buffer
from emberfs.fabric.sinks import PackedSinks
from emberfs.proto.cluster import RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import NodeId, RoutingVersion
from emberfs.runtime.env import Env


class RoutingView(Protocol):
    """What the data path needs of client.routing.Routing."""

    @property
    def snapshot(self) -> RoutingSnapshot:
        """The newest known; never goes back."""
        ...

    async def wait_newer(self, than: RoutingVersion, timeout_ns: int) -> bool:
        """Wait for a snapshot above `than`; False when the time is up."""
        ...

    def subscribe(self, callback: Callable[[RoutingSnapshot], None]) -> object:
        """Be told of every new snapshot."""
        ...


class Peers(Protocol):
    """What the data path needs of fabric.pool.PeerPool."""

    def ready(self, endpoints: tuple[str, ...]) -> Peer | None:
        """Return the connection if there is one."""
        ...

    async def get(self, endpoints: Sequence[str]) -> Peer:
        """Return a usable connection. UNREACHABLE."""
        ...


class _Pending(NamedTuple):
    node: NodeId
    incarnation: int
    abort: Callable[[], None]
    still_good: Callable[[RoutingSnapshot], bool] | None


class StartedCall(NamedTuple):
    """See call.Started."""

    ticket: int
    node: NodeId
    future: asyncio.Future[Reply]
    give_up: Callable[[EmberfsError], None]


class NodeCalls:
    """Performs calls on nodes of the current routing snapshot."""

    def __init__(self, env: Env, routing: RoutingView, peers: Peers) -> None:
        self._env = env
        self._routing = routing
        self._peers = peers
        self._pending: dict[int, _Pending] = {}
        self._count = 0
        self._closed = False
        self.in_flight: dict[NodeId, int] = {}  # calls per node
        routing.subscribe(self._on_routing)

    def close(self) -> None:
        """Stop listening to routing."""
        self._closed = True

    async def call(
        self,
        node: NodeId,
        method: int,
        body: bytes,
        *,
        sources: Sequence[Buffer] = (),
        sinks: Sequence[Buffer] | PackedSinks = (),
        timeout_ns: int,
        still_good: Callable[[RoutingSnapshot], bool] | None = None,
    ) -> Reply:
        """One attempt. Raises what Peer.call raises, UNREACHABLE, or DISCONNECTED (see above)."""
        record = self._routing.snapshot.nodes.get(node)
        if record is None or not record.endpoints:
            raise EmberfsError(Code.UNREACHABLE, f"node {node} is not registered at mgmtd")
        self._count += 1
        ticket = self._count
        self.in_flight[node] = self.in_flight.get(node, 0) + 1
        try:
            async with asyncio.timeout(None) as scope:
                abort = partial(_end_now, scope)
                self._pending[ticket] = _Pending(node, record.incarnation, abort, still_good)
                peer = await self._peers.get(record.endpoints)
                return await peer.call(
                    method, body, sources=sources, sinks=sinks, timeout_ns=timeout_ns
                )
        except TimeoutError:
            raise _died(node) from None
        finally:
            self._pending.pop(ticket, None)
            self.in_flight[node] -= 1

    def _on_routing(self, snapshot: RoutingSnapshot) -> None:
        if self._closed or not self._pending:
            return
        for ticket, pending in list(self._pending.items()):
            if not _pointless(pending, snapshot):
                continue
            del self._pending[ticket]
            pending.abort()

    def start(
        self, node: NodeId, method: int, body: bytes, *, sinks: PackedSinks, timeout_ns: int
    ) -> StartedCall | None:
        """Begin a call if there is a connection with room for it; else None: use `call`.

        It must be released when its future is done. Raises what is wrong from the start.
        """
        record = self._routing.snapshot.nodes.get(node)
        peer = None if record is None else self._peers.ready(record.endpoints)
        if record is None or peer is None:
            return None
        started = peer.start(method, body, sinks=sinks, timeout_ns=timeout_ns)
        if started is None:
            return None
        self._count += 1
        abort = partial(_give_up, started, node)
        self._pending[self._count] = _Pending(node, record.incarnation, abort, None)
        self.in_flight[node] = self.in_flight.get(node, 0) + 1
        return StartedCall(self._count, node, *started)

    def release(self, call: StartedCall) -> None:
        """Hear that the future of a started call is done."""
        self._pending.pop(call.ticket, None)
        self.in_flight[call.node] -= 1


def _end_now(scope: asyncio.Timeout) -> None:
    scope.reschedule(asyncio.get_running_loop().time())


def _give_up(call: Started, node: NodeId) -> None:
    call.give_up(_died(node))


def _died(node: NodeId) -> EmberfsError:
    return EmberfsError(Code.DISCONNECTED, f"node {node} died or lost its part while it was asked")


def _pointless(pending: _Pending, snapshot: RoutingSnapshot) -> bool:
    record = snapshot.nodes.get(pending.node)
    if record is None or not record.alive or record.incarnation != pending.incarnation:
        return True
    return pending.still_good is not None and not pending.still_good(snapshot)
