"""Tenures: whose work may be taken over, and when."""

import pytest

from emberfs.meta.schema import Owner
from emberfs.meta.tenure import REPLACED_NS, Alone, Shared
from emberfs.proto.cluster import Node, NodeKind, RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND, NodeId, RoutingVersion
from unit.meta_world import TestEnv

ME, YOU = NodeId(2), NodeId(3)


class Lease:
    """A lease that a test moves."""

    def __init__(self) -> None:
        self.good = True
        self.lease_ns = 5 * SECOND
        self.needs_version = RoutingVersion(5)
        self.told_version = RoutingVersion(5)

    def lease_ok(self) -> bool:
        return self.good


class Scene:
    """One server that looks at another."""

    def __init__(self) -> None:
        self.env = TestEnv()
        self.lease = Lease()
        self.show(7)
        self.tenure = Shared(self.env, ME, 20, lambda: self.snapshot)
        self.tenure.lease = self.lease

    def show(self, version: int, *, alive: bool = True, incarnation: int = 30) -> None:
        nodes = {
            ME: Node(ME, NodeKind.META, "", (), 20, alive=True),
            YOU: Node(YOU, NodeKind.META, "", (), incarnation, alive=alive),
        }
        self.snapshot = RoutingSnapshot("c", RoutingVersion(version), nodes, {}, {})


def test_a_server_alone_takes_over_whatever_it_finds() -> None:
    alone = Alone(20)
    assert alone.holds(alone.owner())
    assert not alone.is_over(alone.owner())
    assert alone.is_over(Owner(3, 30, 6))
    assert alone.is_over(None)
    assert alone.is_mine(1)
    assert alone.is_gone(30)
    assert not alone.is_gone(20)


def test_the_living_are_not_taken_over_and_the_dead_are() -> None:
    scene, theirs = Scene(), Owner(YOU, 30, 6)
    assert not scene.tenure.is_over(theirs)
    assert not scene.tenure.is_gone(30)
    scene.show(8, alive=False)
    assert scene.tenure.is_over(theirs)
    assert scene.tenure.is_gone(30)


def test_a_death_before_the_tenure_began_does_not_count() -> None:
    """The owner was dead, and is back in a tenure that this server has not heard of."""
    scene, theirs = Scene(), Owner(YOU, 30, 9)
    scene.show(8, alive=False)
    assert not scene.tenure.is_over(theirs)
    scene.show(9)
    assert not scene.tenure.is_over(theirs)
    scene.show(10, alive=False)
    assert scene.tenure.is_over(theirs)


def test_old_routing_says_nothing() -> None:
    scene, theirs = Scene(), Owner(YOU, 30, 6)
    scene.show(8, alive=False)
    scene.lease.told_version = RoutingVersion(9)
    assert not scene.tenure.is_over(theirs)
    scene.lease.told_version = RoutingVersion(8)
    scene.lease.good = False
    assert not scene.tenure.is_over(theirs)
    assert not scene.tenure.is_gone(30)


def test_an_own_tenure_ends_with_the_lease_for_good() -> None:
    scene = Scene()
    first = scene.tenure.owner()
    assert scene.tenure.holds(first)
    scene.lease.good = False
    assert not scene.tenure.holds(first)
    with pytest.raises(EmberfsError) as caught:
        scene.tenure.owner()
    assert caught.value.code == Code.NOT_REGISTERED
    scene.lease.good, scene.lease.needs_version = True, RoutingVersion(7)
    assert not scene.tenure.holds(first)
    assert scene.tenure.is_over(first)
    assert scene.tenure.holds(scene.tenure.owner())


def test_who_was_replaced_under_its_node_id_is_given_time() -> None:
    """The process of before may be frozen, and learns of it at its next heartbeat only."""
    scene, theirs = Scene(), Owner(YOU, 30, 6)
    scene.show(8, incarnation=31)
    assert not scene.tenure.is_over(theirs)
    scene.env.skipped_ns += scene.lease.lease_ns
    assert not scene.tenure.is_over(theirs)
    scene.env.skipped_ns += REPLACED_NS
    assert scene.tenure.is_over(theirs)


def test_work_is_divided_among_the_living() -> None:
    scene = Scene()
    share = sum(scene.tenure.is_mine(key) for key in range(1000))
    assert 400 < share < 600
    scene.show(8, alive=False)
    assert all(scene.tenure.is_mine(key) for key in range(1000))
