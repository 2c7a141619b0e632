"""Which metadata server a call goes to, where there are several on one store.

Any of them can answer any call. Clients are spread by rendezvous hashing of their ids; what changes
the length or the content of a file goes to the server of that file, so that such calls meet in one
place and not in conflicts. A server that fails is left alone for a while, longer each time, and
looked at again by a single call; news of it in the routing end that at once.
"""

from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from emberfs.proto.cluster import Node, NodeKind, RoutingSnapshot
from emberfs.proto.ids import SECOND, NodeId
from emberfs.proto.meta_calls import OpenRequest, PromoteRequest, SetattrRequest, SettleRequest
from emberfs.proto.rendezvous import home_of
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff

SHUN_FIRST_NS = 1 * SECOND
SHUN_MAX_NS = 60 * SECOND
LOOK_NS = 10 * SECOND  # what one call that looks at a shunned server may take


def file_of(request: msgspec.Struct) -> int | None:
    """Return the inode whose server is to be asked, None where the client's own one will do."""
    match request:
        case SettleRequest() | PromoteRequest():
            return request.inode
        case SetattrRequest() if request.length is not None:
            return request.inode
        case OpenRequest() if request.write or request.truncate:
            return request.inode
    return None


@dataclass(slots=True)
class _Shunned:
    record: Node  # as routing showed it when it failed
    backoff: Backoff
    until_ns: int


class MetaServers:
    """The metadata servers as one client has found them."""

    def __init__(self, env: Env, client_id: int) -> None:
        self._env = env
        self._client_id = client_id
        self._shunned: dict[NodeId, _Shunned] = {}
        self._known: tuple[RoutingSnapshot | None, tuple[NodeId, ...]] = (None, ())

    def choose(
        self, snapshot: RoutingSnapshot, inode: int | None = None, but: Collection[NodeId] = ()
    ) -> NodeId | None:
        """Return whom to ask; `but`: who could not help with this call. None if there is nobody."""
        nodes = self._alive(snapshot)
        if len(nodes) <= 1:
            return nodes[0] if nodes else None
        key = self._client_id if inode is None else inode
        left = [node for node in nodes if node not in but] or list(nodes)
        while True:
            home = NodeId(home_of(key, left))
            if len(left) == 1 or self._is_welcome(snapshot, home):
                return home
            left.remove(home)

    def failed(self, snapshot: RoutingSnapshot, node: NodeId) -> None:
        """A server did not answer."""
        record = snapshot.nodes.get(node)
        if record is None:
            return
        known = self._shunned.get(node)
        backoff = known.backoff if known is not None else Backoff(SHUN_FIRST_NS, SHUN_MAX_NS)
        until_ns = self._env.now_ns() + backoff.next_ns(self._env.random)
        self._shunned[node] = _Shunned(record, backoff, until_ns)

    def answered(self, node: NodeId) -> None:
        """A server has answered."""
        if self._shunned:
            self._shunned.pop(node, None)

    def _alive(self, snapshot: RoutingSnapshot) -> tuple[NodeId, ...]:
        """Who lives, or all if nobody does: one may be back before routing says so."""
        if self._known[0] is not snapshot:
            nodes = snapshot.nodes_of(NodeKind.META)
            alive = [node.id for node in nodes if node.alive] or [node.id for node in nodes]
            self._known = (snapshot, tuple(alive))
        return self._known[1]

    def _is_welcome(self, snapshot: RoutingSnapshot, node: NodeId) -> bool:
        shunned = self._shunned.get(node)
        if shunned is None:
            return True
        if snapshot.nodes.get(node) != shunned.record:
            del self._shunned[node]
            return True
        now_ns = self._env.now_ns()
        if now_ns < shunned.until_ns:
            return False
        shunned.until_ns = now_ns + LOOK_NS  # this call looks, the others wait for what it finds
        return True
