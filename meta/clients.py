"""Which clients are dead, as far as routing can tell.

Routing shows a client from its registration to the end of its lease, and comes with a delay: a
client that it does not show may be new. So only who was seen alive before can be dead. While this
server may be out of touch with mgmtd nobody is: who has registered meanwhile, or renewed a lease
that had run out, is not to be seen in old routing.

Clients that say from which version of the routing on they are shown need no such memory: who is not
alive in that version or a newer one has lost its lease. Every server comes to the same conclusion
then, whoever of them has opened the file. The rest is for clients that do not.

A client whose lease had run out opens its files anew before it writes again (client/fence.py). From
that call on it is not called dead until routing has shown it alive: the news may come later.
"""

from collections.abc import Callable

from emberfs.proto.cluster import NodeKind, RoutingSnapshot

SEEN_MAX = 65_536  # clients that are remembered; who is forgotten is not called dead


class Clients:
    """Remembers who was alive."""

    def __init__(
        self, routing: Callable[[], RoutingSnapshot], is_fresh: Callable[[], bool] = lambda: True
    ) -> None:
        """`is_fresh` tells whether routing can be no older than a part of a lease."""
        self.on_heard: Callable[[int], object] = lambda client: None
        self._routing = routing
        self._is_fresh = is_fresh
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

    def alive(self) -> frozenset[int] | None:
        """Who is alive; None while nobody here can know."""
        self.look()
        known = self._looked_at is not None and self._looked_at.version > 0
        return self._alive if known and self._is_fresh() else None

    def heard(self, client: int) -> None:
        """A client opens a file, hence it lives."""
        self.look()
        if client not in self._alive:
            self._seen.pop(client, None)
        self.on_heard(client)

    def is_dead(self, client: int, since: int = 0) -> bool:
        """Tell whether a client was alive, `since` that version, and its lease has run out."""
        alive = self.alive()
        if alive is None or client in alive:
            return False
        return self.shows(since) if since else client in self._seen

    def shows(self, since: int) -> bool:
        """Tell whether routing is that new, so that it shows who lives since then."""
        return self._looked_at is not None and self._looked_at.version >= since
