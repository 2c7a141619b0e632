"""Chains over nodes: every target once, replicas apart, heads and neighbours spread."""

import itertools
from collections import Counter

import pytest

from emberfs.mgmtd.placement import plan_chains
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ChainId, NodeId, TargetId, target_node


def cluster(nodes: int, targets: int) -> dict[NodeId, list[TargetId]]:
    return {
        NodeId(10 + n): [TargetId((10 + n) * 100 + t + 1) for t in range(targets)]
        for n in range(nodes)
    }


def test_three_nodes_have_three_heads() -> None:
    chains = plan_chains(cluster(3, 3), 3, ChainId(1))
    assert [number for number, _ in chains] == [1, 2, 3]
    assert sorted(target_node(targets[0]) for _, targets in chains) == [10, 11, 12]
    assert sorted(target_node(targets[-1]) for _, targets in chains) == [10, 11, 12]
    assert sorted(t for _, targets in chains for t in targets) == sorted(
        t for targets in cluster(3, 3).values() for t in targets
    )


@pytest.mark.parametrize(
    ("nodes", "targets", "replicas"),
    [c for c in itertools.product(range(1, 8), (1, 2, 3, 6), (1, 2, 3)) if c[0] >= c[2]],
)
def test_every_shape(nodes: int, targets: int, replicas: int) -> None:
    chains = plan_chains(cluster(nodes, targets), replicas, ChainId(1))
    assert len(chains) == nodes * targets // replicas
    used = [t for _, chain in chains for t in chain]
    assert len(set(used)) == len(used)
    for _, chain in chains:
        assert len({target_node(t) for t in chain}) == len(chain) == replicas
    heads = Counter(target_node(chain[0]) for _, chain in chains)
    counts = [heads[node] for node in cluster(nodes, targets)]
    assert max(counts) - min(counts) <= 1


def test_lost_nodes_load_spreads() -> None:
    chains = plan_chains(cluster(6, 5), 3, ChainId(1))
    for node in cluster(6, 5):
        neighbours = Counter(
            target_node(t)
            for _, chain in chains
            if node in map(target_node, chain)
            for t in chain
            if target_node(t) != node
        )
        assert len(neighbours) == 5
        assert max(neighbours.values()) <= 4


def test_uneven_nodes() -> None:
    targets = {NodeId(1): [TargetId(100 + n) for n in range(4)]}
    targets |= {NodeId(2): [TargetId(200)], NodeId(3): [TargetId(300)]}
    chains = plan_chains(targets, 2, ChainId(5))
    assert [number for number, _ in chains] == [5, 6]
    assert all(len({target_node(t) for t in chain}) == 2 for _, chain in chains)


def test_too_few_nodes_is_an_error_unless_allowed() -> None:
    with pytest.raises(EmberfsError, match="3 storage nodes") as caught:
        plan_chains(cluster(2, 3), 3, ChainId(1))
    assert caught.value.code == Code.CONFIG
    assert len(plan_chains(cluster(2, 3), 3, ChainId(1), allow_same_node=True)) == 2
    with pytest.raises(EmberfsError, match="3 targets"):
        plan_chains(cluster(1, 2), 3, ChainId(1), allow_same_node=True)
