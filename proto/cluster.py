"""Cluster state: nodes, targets, chains, and the routing snapshot that mgmtd publishes.

Invariants: a chain lists its targets head first, in the order SERVING, LASTSRV, SYNCING, WAITING,
OFFLINE; at most one target of a chain is SYNCING; the chain version rises with every change.
"""

from enum import IntEnum

import msgspec

from emberfs.proto.ids import ChainId, ChainVersion, NodeId, RoutingVersion, TargetId


class ClusterId(msgspec.Struct, frozen=True, gc=False):
    """Which cluster is meant. Two may have one name, by mistake; no two have one identity."""

    name: str
    identity: int = 0  # random, minted with the first state of the cluster; 0: not known yet

    def differs(self, other: "ClusterId") -> bool:
        """Tell whether the two cannot be the same cluster."""
        if self.name != other.name:
            return True
        return self.identity != other.identity and self.identity != 0 and other.identity != 0

    def beside(self, other: "ClusterId") -> str:
        """How people tell it from another: by its name if that is enough, else by its identity."""
        if self.name != other.name:
            return f'"{self.name}"'
        return f'"{self.name}" of identity {self.identity:x}'


class PublicState(IntEnum):
    """State of a target as mgmtd publishes it."""

    SERVING = 1  # complete: reads and writes
    LASTSRV = 2  # was serving when the last complete replica of the chain was lost
    SYNCING = 4  # receives writes and is being filled; no reads
    WAITING = 8  # alive, waits for its turn to be filled
    OFFLINE = 16  # not alive, or not to be used


class LocalState(IntEnum):
    """State of a target as its own storage service reports it."""

    UPTODATE = 1  # holds everything that its chain has committed
    ONLINE = 2  # opened and usable, completeness unknown to itself
    OFFLINE = 4  # not usable: unopened, disk error, or its recovery is asked for


class NodeKind(IntEnum):
    """What a registered process is."""

    MGMTD = 0
    META = 1
    STORAGE = 2
    CLIENT = 3


class Node(msgspec.Struct, frozen=True, gc=False):
    """A registered process. A node record outlives its process; `incarnation` does not."""

    id: NodeId  # for clients the low 32 bits of the client id
    kind: NodeKind
    host: str
    # Data-plane endpoints, best first: "shm://<host key>/<socket path>", "tcp://<ip>:<port>".
    endpoints: tuple[str, ...]
    incarnation: int  # random per process start: tells a restart from a hiccup
    alive: bool
    metrics: str = ""  # "ip:port" of its Prometheus endpoint
    client: int = 0  # full client id where kind is CLIENT


class ChainTarget(msgspec.Struct, frozen=True, gc=False):
    """One place in a chain."""

    target: TargetId
    node: NodeId
    state: PublicState


class Chain(msgspec.Struct, frozen=True, gc=False):
    """A replication chain, head first."""

    id: ChainId
    version: ChainVersion
    targets: tuple[ChainTarget, ...]
    # The version at which a replica brought the chain back that had lost what was not flushed: what
    # was acknowledged at an older version and not flushed may be gone. 0: never. Kept for ever.
    lost: ChainVersion = ChainVersion(0)

    def serving(self) -> tuple[ChainTarget, ...]:
        """Targets that answer reads, head first."""
        return tuple(t for t in self.targets if t.state == PublicState.SERVING)

    def writable(self) -> tuple[ChainTarget, ...]:
        """Targets that receive writes: the serving ones, then the syncing one."""
        return tuple(
            t for t in self.targets if t.state in (PublicState.SERVING, PublicState.SYNCING)
        )

    def head(self) -> ChainTarget | None:
        """Where writes enter; None while nothing serves."""
        serving = self.serving()
        return serving[0] if serving else None

    def tail(self) -> ChainTarget | None:
        """The last serving target: its committed version is the truth for reads."""
        serving = self.serving()
        return serving[-1] if serving else None

    def successor(self, target: TargetId) -> ChainTarget | None:
        """Who receives this target's forwards; None at the end or when not writable."""
        writable = self.writable()
        for place, member in enumerate(writable[:-1]):
            if member.target == target:
                return writable[place + 1]
        return None

    def member(self, target: TargetId) -> ChainTarget | None:
        """Return this target's place."""
        return next((t for t in self.targets if t.target == target), None)


class TargetReport(msgspec.Struct, frozen=True, gc=False):
    """What a storage service says of one of its targets with every heartbeat."""

    target: TargetId
    local: LocalState
    # The chain version on which the local state was decided; 0 before any chain is known. mgmtd
    # ignores UPTODATE and OFFLINE that were decided on an older chain.
    chain_version: ChainVersion
    used_bytes: int
    capacity_bytes: int  # what this target could hold at most: used + its share of the free space
    reason: str = ""  # why it is OFFLINE, in words
    sync_done_bytes: int = 0  # recovery progress, reported by the target that is being filled
    sync_total_bytes: int = 0
    sync_done_chunks: int = 0
    sync_total_chunks: int = 0
    sync_bytes_per_s: int = 0  # rate at present
    sync_source: TargetId = TargetId(0)  # who fills it
    sync_problem: str = ""  # why the recovery does not advance, in words
    damaged_chunks: int = 0  # known to be damaged here and not repaired yet
    scrub_percent: int = 0  # of the pass in work; 0 while none is
    scrub_finished_s: int = 0  # when the last whole pass ended, seconds since 1970; 0: never
    scrub_findings: int = 0  # damaged or differing chunks since the process started
    unreachable: tuple[TargetId, ...] = ()  # members of its chain that have not answered it lately
    # What it acknowledged and had not flushed may be gone (a power cut, a failed sync), and it has
    # neither been filled nor served since.
    doubtful: bool = False


class TargetStatus(msgspec.Struct, frozen=True, gc=False):
    """A target as mgmtd last heard of it."""

    target: TargetId
    node: NodeId
    chain: ChainId  # 0 while it belongs to no chain
    public: PublicState
    report: TargetReport
    unwanted: str = ""  # why it is to leave its chain by itself, until this is empty again


class RoutingSnapshot(msgspec.Struct, frozen=True, gc=False):
    """Everything needed to reach data. Published whole, versions only rise."""

    cluster: str
    version: RoutingVersion
    nodes: dict[NodeId, Node]
    chains: dict[ChainId, Chain]
    targets: dict[TargetId, TargetStatus]
    identity: int = 0  # see ClusterId

    def nodes_of(self, kind: NodeKind) -> list[Node]:
        """Nodes of a kind, alive or not, by id."""
        return sorted((n for n in self.nodes.values() if n.kind == kind), key=lambda n: n.id)


EMPTY_ROUTING = RoutingSnapshot(
    cluster="", version=RoutingVersion(0), nodes={}, chains={}, targets={}
)
