"""Which clients are dead, as far as routing can tell.

Routing shows a client from its registration to the end of its lease, and comes with a delay: a
client that it does not show may be new. So only who was seen alive before can be dead.
"""

from collections.abc import Callable

from emberfs.proto.cluster import NodeKind, RoutingSnapshot

SEEN_MAX = 65_536  # clients that are remembered; who is forgotten is not called dead


class Clients:
    """Remembers who was alive."""

    def __init__(self, routing: Callable[[], RoutingSnapshot]) -> None:
        self._routing = routing
        self._looked_at: RoutingSnapshot | None = None
        self._alive: frozenset[int] = frozenset()
        self._seen: dict[int, None] = {}  # in the order of the last sight

    def look(self) -> None:
        """Take note of who is alive now; often enough that nobody comes and goes in between."""
        snapshot = self._routing()
        if snapshot is self._looked_at:
            return
        self._looked_at = snapshot
        nodes = snapshot.nodes_of(NodeKind.CLIENT)
        self._alive = frozenset(node.client for node in nodes if node.alive)
        for client in self._alive:
            self._seen.pop(client, None)
            self._seen[client] = None
        while len(self._seen) > SEEN_MAX:
            del self._seen[next(iter(self._seen))]

    def is_dead(self, client: int) -> bool:
        """Tell whether a client was alive and its lease has run out."""
        self.look()
        return client in self._seen and client not in self._alive
