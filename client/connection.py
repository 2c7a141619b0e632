"""How one management service is spoken to: what Control needs of gRPC, or of the simulator."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

import msgspec

from emberfs.proto.cluster import ClusterId, Node, NodeKind, RoutingSnapshot, TargetReport
from emberfs.proto.ids import SECOND, ChainId, NodeId, RoutingVersion, TargetId

CALL_TIMEOUT_NS = 2 * SECOND


class Lease(msgspec.Struct, frozen=True, gc=False):
    """What mgmtd grants with a registration or heartbeat."""

    lease_ns: int
    heartbeat_ns: int
    version: RoutingVersion  # of its newest snapshot
    identity: int = 0  # of the cluster, see ClusterId


class Connection(Protocol):
    """One management service. Raises only EmberfsError; a call must end within CALL_TIMEOUT_NS.

    `cluster` is passed on as it is: the service refuses another with WRONG_CLUSTER.
    """

    async def register(
        self, cluster: ClusterId, node: Node, reports: Sequence[TargetReport]
    ) -> Lease:
        """Announce a process; see Control.register."""
        ...

    async def heartbeat(
        self,
        cluster: ClusterId,
        node_id: NodeId,
        kind: NodeKind,
        incarnation: int,
        reports: Sequence[TargetReport],
        client: int,
    ) -> Lease:
        """Renew a lease; see Control.heartbeat."""
        ...

    async def report_death(self, cluster: ClusterId, node_id: NodeId, incarnation: int) -> None:
        """Report that a process is dead; see Control.report_death."""
        ...

    async def create_chains(
        self, cluster: ClusterId, chains: Sequence[tuple[ChainId, tuple[TargetId, ...]]]
    ) -> list[ChainId]:
        """Create chains; see Control.create_chains."""
        ...

    def watch(
        self, cluster: ClusterId, have_version: RoutingVersion
    ) -> AsyncGenerator[RoutingSnapshot, None]:
        """Yield every newer snapshot. Must fail within seconds when the peer falls silent."""
        ...

    async def close(self) -> None:
        """End all calls."""
        ...


class Connect(Protocol):
    """How to reach an address."""

    def __call__(self, address: str) -> Connection:
        """Return a connection that opens itself when it is first used."""
        ...
