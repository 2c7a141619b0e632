"""What happens to the membership machine, and what it wants done.

Effects are performed in list order: Persist stands before Publish, and both before the answer.
"""

from typing import TypeAlias

import msgspec

from emberfs.proto.cluster import Chain, Node, NodeKind, RoutingSnapshot, TargetReport
from emberfs.proto.errors import Code
from emberfs.proto.ids import ChainId, NodeId, RoutingVersion, TargetId


class Loaded(msgspec.Struct, frozen=True, gc=False):
    """The stored state of the cluster; the first event of all, with nothing stored as well."""

    nodes: tuple[Node, ...] = ()
    chains: tuple[Chain, ...] = ()
    reserved: RoutingVersion = RoutingVersion(0)  # no version above this was ever published
    lease_ns: int = 0  # the lease that nodes were promised before
    identity: int = 0  # of the cluster, see ClusterId


class Registered(msgspec.Struct, frozen=True, gc=False):
    """A process announces itself."""

    node: Node
    reports: tuple[TargetReport, ...]


class HeartbeatArrived(msgspec.Struct, frozen=True, gc=False):
    """A process renews its lease. `reports` names all its targets."""

    node: NodeId
    kind: NodeKind
    incarnation: int
    reports: tuple[TargetReport, ...]


class DeathReported(msgspec.Struct, frozen=True, gc=False):
    """Its host says that no thread of a process is left."""

    node: NodeId
    incarnation: int


class ChainsRequested(msgspec.Struct, frozen=True, gc=False):
    """An operator wants these chains, head first."""

    chains: tuple[tuple[ChainId, tuple[TargetId, ...]], ...]


class Ticked(msgspec.Struct, frozen=True, gc=False):
    """Time has passed; comes every `Timing.tick_ns`."""


Event: TypeAlias = Loaded | Registered | HeartbeatArrived | DeathReported | ChainsRequested | Ticked


class Persist(msgspec.Struct, frozen=True, gc=False):
    """Store in one atomic write. `durable`: it must also survive a power cut."""

    nodes: tuple[Node, ...]
    dropped: tuple[NodeId, ...]
    chains: tuple[Chain, ...]
    reserved: RoutingVersion  # 0: unchanged
    durable: bool
    lease_ns: int = 0  # the longest lease that a node may still hold; 0: unchanged


class Publish(msgspec.Struct, frozen=True, gc=False):
    """Push a newer snapshot to everybody who watches."""

    snapshot: RoutingSnapshot


class Answer(msgspec.Struct, frozen=True, gc=False):
    """The request of this event was granted."""

    version: RoutingVersion
    created: tuple[ChainId, ...] = ()


class Refused(msgspec.Struct, frozen=True, gc=False):
    """The request of this event was not granted, and nothing has changed by it."""

    code: Code
    message: str


Effect: TypeAlias = Persist | Publish | Answer | Refused


class Timing(msgspec.Struct, frozen=True, gc=False):
    """The promises about time."""

    lease_ns: int
    heartbeat_ns: int

    @property
    def tick_ns(self) -> int:
        """How often time must be looked at: a death is noticed this late at most."""
        return self.lease_ns // 20

    @property
    def election_lease_ns(self) -> int:
        """How long a mgmtd leads by one renewal.

        Another must have taken over, and nodes must have found it, within half a lease of theirs:
        then they stop serving.
        """
        return self.lease_ns * 2 // 5
