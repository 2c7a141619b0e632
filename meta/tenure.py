"""Who does what among several metadata servers on one store.

Most of what a server does is a transaction, and needs no agreement. Cutting chunks is none: a cut
that comes late would take what was written since. So a cut has one owner at a time, a server within
one tenure, and its record in the store says who that is (trims.py). A tenure ends for good when the
lease of its server has run out, even if the same process is heard again:

- the server itself changes no chunk from half a lease after its last heartbeat on (chunkguard.py);
- the others take over when routing, as new as the tenure or newer, shows the server dead: a whole
  lease after that heartbeat arrived. Whatever it had sent has arrived by then.

Work that may be done twice (collection, ends of sessions, old replies) is only divided, by
rendezvous hashing among the servers that live: who disagrees about that does no harm.
"""

from collections.abc import Callable
from typing import Protocol

from emberfs.meta.schema import Owner
from emberfs.proto.cluster import NodeKind, RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND, NodeId, RoutingVersion
from emberfs.proto.rendezvous import home_of
from emberfs.runtime.env import Env

REPLACED_NS = 2 * SECOND  # and a lease: how long a process may go on when another has its node id


class Lease(Protocol):
    """What is asked of client.agent.Agent."""

    lease_ns: int
    needs_version: RoutingVersion
    told_version: RoutingVersion

    def lease_ok(self) -> bool:
        """Tell whether nobody else can have been put in our place yet."""
        ...


class Tenure(Protocol):
    """One server's view of itself and the others."""

    incarnation: int

    def owner(self) -> Owner:
        """This server as an owner of work. NOT_REGISTERED while its lease may run out."""
        ...

    def holds(self, owner: Owner | None) -> bool:
        """Tell whether the owner is this server in its present tenure, and its lease is good."""
        ...

    def is_over(self, owner: Owner | None) -> bool:
        """Tell whether that tenure has ended for certain: its work may be taken over."""
        ...

    def is_mine(self, key: int) -> bool:
        """Tell whether divided work on a key falls to this server."""
        ...

    def is_gone(self, incarnation: int) -> bool:
        """Tell whether a process, another than this one, is not seen alive now."""
        ...


class Alone:
    """The only server on its store: whoever else appears there was an earlier life of it."""

    def __init__(self, incarnation: int, node: int = 0) -> None:
        self.incarnation = incarnation
        self._owner = Owner(node, incarnation, 0)

    def owner(self) -> Owner:
        """See Tenure."""
        return self._owner

    def holds(self, owner: Owner | None) -> bool:
        """See Tenure."""
        return owner == self._owner

    def is_over(self, owner: Owner | None) -> bool:
        """See Tenure."""
        return owner != self._owner

    def is_mine(self, key: int) -> bool:
        """See Tenure."""
        return True

    def is_gone(self, incarnation: int) -> bool:
        """See Tenure."""
        return incarnation != self.incarnation


class Shared:
    """One of several servers on one store."""

    def __init__(
        self, env: Env, node: NodeId, incarnation: int, routing: Callable[[], RoutingSnapshot]
    ) -> None:
        self.incarnation = incarnation
        self.lease: Lease | None = None  # from the registration on
        self._env = env
        self._node = node
        self._routing = routing
        self._replaced_ns: dict[Owner, int] = {}  # since when another has its node id

    def owner(self) -> Owner:
        """See Tenure."""
        if self.lease is None or not self.lease.lease_ok():
            raise EmberfsError(
                Code.NOT_REGISTERED, f"the lease of meta {self._node} has run out; ask another one"
            )
        return Owner(self._node, self.incarnation, self.lease.needs_version)

    def holds(self, owner: Owner | None) -> bool:
        """See Tenure."""
        return self.lease is not None and self.lease.lease_ok() and owner == self.owner()

    def is_over(self, owner: Owner | None) -> bool:
        """See Tenure."""
        if owner is None:  # of a server that knew of no others
            return True
        snapshot, lease = self._fresh(), self.lease
        if snapshot is None or lease is None or owner == self.owner():
            return False
        if owner.incarnation == self.incarnation:
            return True  # an earlier tenure of this process
        node = snapshot.nodes.get(NodeId(owner.node))
        if snapshot.version < owner.since:
            return False
        if node is None or node.incarnation == owner.incarnation:
            return node is None or not node.alive
        now_ns = self._env.now_ns()
        since_ns = self._replaced_ns.setdefault(owner, now_ns)
        return now_ns - since_ns >= lease.lease_ns + REPLACED_NS

    def is_mine(self, key: int) -> bool:
        """See Tenure."""
        nodes = self._routing().nodes_of(NodeKind.META)
        return home_of(key, {self._node, *(n.id for n in nodes if n.alive)}) == self._node

    def is_gone(self, incarnation: int) -> bool:
        """See Tenure."""
        snapshot = self._fresh()
        if snapshot is None or incarnation == self.incarnation:
            return False
        nodes = snapshot.nodes_of(NodeKind.META)
        return all(node.incarnation != incarnation for node in nodes if node.alive)

    def _fresh(self) -> RoutingSnapshot | None:
        """Routing, if mgmtd has answered lately and what it knew then is here."""
        snapshot, lease = self._routing(), self.lease
        fresh = lease is not None and lease.lease_ok() and snapshot.version >= lease.told_version
        return snapshot if fresh else None
