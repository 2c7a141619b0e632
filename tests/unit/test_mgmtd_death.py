"""A reported death ends a lease at once, and only the lease of that very process."""

import pytest

from emberfs.mgmtd.events import Answer, DeathReported, Refused
from emberfs.mgmtd.membership import Membership
from emberfs.proto.cluster import PublicState
from emberfs.proto.errors import Code
from emberfs.proto.ids import NodeId
from unit.test_mgmtd_membership import ON, UP, L, O, S, report, storage, three


def died(node: int, incarnation: int = 1) -> DeathReported:
    return DeathReported(NodeId(node), incarnation)


def test_r9_a_reported_death_takes_effect_at_once() -> None:
    """The chain closes without waiting for the lease of a process that its host knows dead."""
    world = three()
    assert isinstance(world.send(died(2)), Answer)
    assert world.states() == [(1, S), (3, S), (2, O)]
    assert not world.now.nodes[NodeId(2)].alive
    version, count = world.version(), len(world.published)
    assert isinstance(world.send(died(2)), Answer), "it may be repeated"
    assert (world.version(), len(world.published)) == (version, count)


def test_a_late_heartbeat_of_the_dead_does_not_bring_it_back() -> None:
    world = three()
    world.send(died(1))
    refused = world.beat(1, report(101, UP, 1))
    assert isinstance(refused, Refused)
    assert refused.code == Code.NOT_REGISTERED
    assert world.states() == [(2, S), (3, S), (1, O)]
    world.register(storage(1, 2), report(101, ON))
    assert world.states() == [(2, S), (3, S), (1, PublicState.SYNCING)]


@pytest.mark.parametrize("node", [1, 7, 900])
def test_the_death_of_an_earlier_life_is_no_news(node: int) -> None:
    """The next process of the node may be up before the death of the last is reported."""
    world = three()
    world.register(storage(1, 2), report(101, ON))
    count = len(world.published)
    assert isinstance(world.send(died(node)), Answer)
    assert world.states() == [(1, S), (2, S), (3, S)]
    assert len(world.published) == count


def test_r7_the_last_of_a_chain_is_remembered_as_such() -> None:
    """Whoever died last is complete and brings the chain back; the others are filled."""
    world = three()
    for node in (1, 2, 3):
        world.send(died(node))
    assert world.states() == [(3, L), (1, O), (2, O)]
    world.register(storage(1, 2), report(101, ON))
    assert world.states() == [(3, L), (1, PublicState.WAITING), (2, O)]
    world.register(storage(3, 2), report(301, ON))
    assert world.states() == [(3, S), (1, PublicState.SYNCING), (2, O)]


def test_deaths_are_believed_also_in_the_grace_time_of_a_restarted_mgmtd() -> None:
    """Grace is for heartbeats that may lie unread; a death is no absence of news."""
    world = three().restarted()
    assert isinstance(world.machine, Membership)
    world.send(died(3))
    assert world.states() == [(1, S), (2, S), (3, O)]
