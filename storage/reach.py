"""Which other nodes answer us [pure].

A node that does not answer may be dead, which mgmtd finds out by its lease. Or the two of us alone
cannot reach each other, which nobody but us can know: while both of us keep our leases, every write
that passes from one to the other would wait for ever. So silence is measured here and told to mgmtd
with the heartbeats (TargetReport.unreachable), which asks one of us to leave the chain.

    call outstanding for OVERDUE_NS, or lost     -> the node is to be pinged
    any answer, an error as well                 -> nothing is held against it
    no answer to anything for UNREACHABLE_NS     -> unreachable, until it answers a ping

A long update does not make its node silent: pings are answered beside it.
"""

from collections.abc import Collection

from emberfs.proto.ids import MS, SECOND, NodeId

OVERDUE_NS = 1 * SECOND
UNREACHABLE_NS = 3 * SECOND
LOOK_NS = 500 * MS  # how often whoever drives this looks at it


class Reach:
    """What is known of the nodes that we call. All times are of one monotonic clock."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[NodeId, int]] = {}  # call -> its node, when it was sent
        self._heard_ns: dict[NodeId, int] = {}  # the last answer
        self._silent_ns: dict[NodeId, int] = {}  # since when nothing has been answered
        self._calls = 0

    def sent(self, node: NodeId, now_ns: int) -> int:
        """Note a call; return a ticket for its end."""
        self._calls += 1
        self._open[self._calls] = (node, now_ns)
        return self._calls

    def answered(self, ticket: int, now_ns: int) -> None:
        """The node has said something."""
        node, _ = self._open.pop(ticket)
        self._heard_ns[node] = now_ns
        self._silent_ns.pop(node, None)

    def lost(self, ticket: int) -> None:
        """The call has ended without a word of the node."""
        node, sent_ns = self._open.pop(ticket)
        if node not in self._silent_ns:
            others = [at_ns for other, at_ns in self._open.values() if other == node]
            self._silent_ns[node] = max(min([sent_ns, *others]), self._heard_ns.get(node, 0))

    def given_up(self, ticket: int) -> None:
        """The caller has gone: that says nothing."""
        self._open.pop(ticket)

    def doubtful(self, now_ns: int) -> list[NodeId]:
        """Nodes to be pinged, in order."""
        overdue = {node for node, sent_ns in self._open.values() if now_ns - sent_ns > OVERDUE_NS}
        return sorted(overdue | self._silent_ns.keys())

    def unreachable(self, now_ns: int) -> frozenset[NodeId]:
        """Nodes that have been silent for too long."""
        silent = self._silent_ns.items()
        return frozenset(node for node, since_ns in silent if now_ns - since_ns >= UNREACHABLE_NS)

    def keep(self, nodes: Collection[NodeId]) -> None:
        """Forget all nodes but these: whoever is dead, or of no concern, is nobody's fault."""
        for known in (self._silent_ns, self._heard_ns):
            for node in [node for node in known if node not in nodes]:
                del known[node]
