"""Which targets form a chain: heads rotate over the nodes, and replicas spread evenly.

Chains are drawn one after another from the nodes with the most unused targets; among equals, from
those that have met the members of the chain least often, so that the load of a lost node falls on
many others. Deterministic.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence

from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ChainId, NodeId, TargetId


def plan_chains(
    targets: Mapping[NodeId, Sequence[TargetId]],
    replicas: int,
    first_chain_id: ChainId,
    *,
    allow_same_node: bool = False,
) -> list[tuple[ChainId, tuple[TargetId, ...]]]:
    """Return as many chains of `replicas` targets as fit, head first, numbered from the first id.

    No target is in two chains; what does not fill a chain stays unused. The replicas of a chain
    lie on different nodes unless `allow_same_node`. Raises EmberfsError(CONFIG) when not even one
    chain fits.
    """
    left = {node: len(targets[node]) for node in sorted(targets) if targets[node]}
    count = _chain_count(left, replicas, allow_same_node=allow_same_node)
    met: Counter[tuple[NodeId, NodeId]] = Counter()
    groups: list[list[NodeId]] = []
    room = dict(left)
    for _ in range(count):
        members = _draw(room, met, replicas)
        assert allow_same_node or len(set(members)) == replicas
        for node in members:
            room[node] -= 1
        met.update((a, b) for a in members for b in members if a != b)
        groups.append(members)
    unused = {node: list(targets[node]) for node in left}
    chains = []
    for number, ordered in enumerate(_order(groups, _choose_heads(groups), sorted(left))):
        chain = tuple(unused[node].pop(0) for node in ordered)
        chains.append((ChainId(first_chain_id + number), chain))
    return chains


def _chain_count(left: Mapping[NodeId, int], replicas: int, *, allow_same_node: bool) -> int:
    """Return how many chains fit (Gale-Ryser: no node gives more than one target per chain)."""
    if replicas < 1:
        raise EmberfsError(Code.CONFIG, f"{replicas} replicas: at least 1 is needed")
    total = sum(left.values())
    if not allow_same_node and len(left) < replicas:
        raise EmberfsError(
            Code.CONFIG,
            f"{replicas} replicas need {replicas} storage nodes with targets, there are "
            f"{len(left)}: add nodes, ask for fewer replicas, or allow replicas on the same node",
        )
    if total < replicas:
        raise EmberfsError(
            Code.CONFIG, f"{replicas} replicas need {replicas} targets, there are {total}: add some"
        )
    count = total // replicas
    while not allow_same_node and sum(min(n, count) for n in left.values()) < count * replicas:
        count -= 1
    return count


def _draw(
    room: Mapping[NodeId, int], met: Counter[tuple[NodeId, NodeId]], replicas: int
) -> list[NodeId]:
    """Choose the nodes of one chain; a node twice only when no other has a target left."""
    members: list[NodeId] = []
    for _ in range(replicas):

        def rank(node: NodeId) -> tuple[int, int, int, NodeId]:
            free = room[node] - members.count(node)
            meetings = sum(met[node, member] for member in members)
            return members.count(node), -free, meetings, node

        members.append(min((n for n in room if room[n] > members.count(n)), key=rank))
    return members


def _choose_heads(groups: list[list[NodeId]]) -> list[NodeId]:
    """Choose a head per group, so that no node has two more than another that could take one."""
    heads: list[NodeId] = []
    counts: Counter[NodeId] = Counter()
    for members in groups:
        head = min(members, key=lambda node: (counts[node], node))
        counts[head] += 1
        heads.append(head)
    while path := _relief(groups, heads, counts):
        for group, node in path:
            counts[heads[group]] -= 1
            counts[node] += 1
            heads[group] = node
    return heads


def _relief(
    groups: list[list[NodeId]], heads: list[NodeId], counts: Counter[NodeId]
) -> list[tuple[int, NodeId]]:
    """Find a shortest list of (group, new head) that takes one head from a node for one with fewer.

    Breadth first from the most loaded nodes; empty when no node has two more than it must.
    """
    for start in sorted({n for g in groups for n in g}, key=lambda node: (-counts[node], node)):
        paths: dict[NodeId, list[tuple[int, NodeId]]] = {start: []}
        todo = deque([start])
        while todo:
            giver = todo.popleft()
            for group, members in enumerate(groups):
                if heads[group] != giver:
                    continue
                for taker in members:
                    if taker not in paths:
                        paths[taker] = [*paths[giver], (group, taker)]
                        todo.append(taker)
                        if counts[taker] <= counts[start] - 2:
                            return paths[taker]
    return []


def _order(
    groups: list[list[NodeId]], heads: list[NodeId], ring: list[NodeId]
) -> list[list[NodeId]]:
    """Give each place after the head to who has had it least; ties go round the ring of nodes."""
    placed: Counter[tuple[int, NodeId]] = Counter()
    chains = []
    for members, head in zip(groups, heads, strict=True):
        ordered, remaining = [head], list(members)
        remaining.remove(head)
        while remaining:
            place, start = len(ordered), ring.index(ordered[-1])

            def rank(node: NodeId, place: int = place, start: int = start) -> tuple[int, int]:
                return placed[place, node], (ring.index(node) - start) % len(ring)

            chosen = min(remaining, key=rank)
            placed[place, chosen] += 1
            remaining.remove(chosen)
            ordered.append(chosen)
        chains.append(ordered)
    return chains
