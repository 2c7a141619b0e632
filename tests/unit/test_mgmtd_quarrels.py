"""Who leaves a chain when its members do not reach each other."""

from itertools import product

import msgspec
import pytest

from emberfs.mgmtd.quarrels import unwanted
from emberfs.proto.cluster import Chain, ChainTarget, LocalState, PublicState
from emberfs.proto.ids import ChainId, ChainVersion, TargetId, target_node
from unit.test_mgmtd_membership import TARGETS, O, S, W, Y, report, three

A, B, C = TARGETS
ALL = frozenset(TARGETS)


def chain(*states: PublicState) -> Chain:
    members = zip(TARGETS, states, strict=True)
    places = tuple(ChainTarget(t, target_node(t), state) for t, state in members)
    return Chain(ChainId(1), ChainVersion(1), places)


def leaving(
    states: tuple[PublicState, ...],
    said: dict[TargetId, set[TargetId]],
    alive: frozenset[TargetId] = ALL,
) -> set[TargetId]:
    found = unwanted(chain(*states), {t: frozenset(m) for t, m in said.items()}, alive)
    assert all(found.values()), "everybody is told why"
    return set(found)


@pytest.mark.parametrize(
    ("states", "said", "expected"),
    [
        ((S, S, S), {}, set()),
        ((S, S, S), {A: {B}}, {B}),
        ((S, S, S), {B: {C}}, {C}),
        ((S, S, S), {A: {C}}, set()),  # no neighbour: reads go elsewhere, writes do not pass there
        ((S, S, S), {A: {B, C}}, {A}),
        ((S, S, S), {B: {A, C}}, {B}),
        ((S, S, S), {C: {A, B}}, set()),  # the tail sends to nobody
        ((S, S, S), {A: {B}, B: {C}}, {B}),  # who is to leave itself is not listened to
        ((S, S, S), {A: {B, C}, B: {A, C}}, {A, C}),
        ((S, S, Y), {B: {C}}, {C}),
        ((S, Y, O), {A: {B}}, {B}),
        ((S, W, O), {A: {B, C}}, {B, C}),  # nobody could fill them
        ((S, S, O), {A: {C}}, set()),  # B fills it
        ((S, S, O), {B: {C}}, {C}),
        ((S, S, O), {A: {B}, B: {C}}, {B}),  # A stays, and reaches C
    ],
)
def test_who_leaves(
    states: tuple[PublicState, ...], said: dict[TargetId, set[TargetId]], expected: set[TargetId]
) -> None:
    assert leaving(states, said) == expected


def test_the_dead_neither_complain_nor_are_complained_of() -> None:
    assert leaving((S, S, S), {A: {B}}, frozenset({A, C})) == set()
    assert leaving((S, S, S), {A: {B}}, frozenset({B, C})) == set()


def test_somebody_always_serves_and_only_members_leave() -> None:
    """Whatever is said, by whomever: one serving member that is alive is not asked to leave."""
    pairs = [(one, other) for one in TARGETS for other in TARGETS if one != other]
    for states in ((S, S, S), (S, S, Y), (S, S, O), (S, Y, W), (S, O, O)):
        for chosen in product((False, True), repeat=len(pairs)):
            said: dict[TargetId, set[TargetId]] = {t: set() for t in TARGETS}
            for (one, other), yes in zip(pairs, chosen, strict=True):
                if yes:
                    said[one].add(other)
            for alive in (ALL, frozenset({A, B}), frozenset({A, C})):
                gone = leaving(states, said, alive)
                serving = {m.target for m in chain(*states).serving()} & alive
                assert serving - gone
                assert gone <= alive


def test_a_complaint_is_published_at_once_and_ends_with_its_cause() -> None:
    """The target that is asked to leave learns it with the next snapshot."""
    world = three()
    count = len(world.published)
    bad = msgspec.structs.replace(report(101, version=1), unreachable=(B,))
    world.beat(1, bad)
    assert len(world.published) == count + 1
    assert world.now.targets[B].unwanted
    assert world.states() == [(1, S), (2, S), (3, S)], "nobody is put out"
    world.beat(2, report(201, LocalState.OFFLINE, version=1))
    assert world.states() == [(1, S), (3, S), (2, O)]
    world.beat(1, report(101, version=2))
    assert not world.now.targets[B].unwanted
