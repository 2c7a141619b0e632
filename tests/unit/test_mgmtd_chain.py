"""Every state of chains of one to three replicas, every rule as a sentence, then random walks."""

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import pytest

from emberfs.mgmtd.chain import GROUP_ORDER, TABLE, check_chain, next_chain
from emberfs.proto.cluster import Chain, ChainTarget, LocalState, PublicState
from emberfs.proto.ids import ChainId, ChainVersion, NodeId, TargetId

GOLDEN = Path(__file__).parent.parent / "golden" / "mgmtd_chain.txt"
S, L, Y, W, O = PublicState  # noqa: E741 - the letters of the golden table
UP, ON, OFF = LocalState
LOCALS: tuple[LocalState | None, ...] = (UP, ON, OFF, None)
LETTERS = {S: "S", L: "L", Y: "Y", W: "W", O: "O"}
LOCAL_LETTERS = {UP: "u", ON: "o", OFF: "-", None: "?"}


def make(states: Iterable[PublicState]) -> Chain:
    return Chain(
        ChainId(1),
        ChainVersion(7),
        tuple(
            ChainTarget(TargetId((n + 1) * 100 + 1), NodeId(n + 1), s) for n, s in enumerate(states)
        ),
    )


def local_of(chain: Chain, locals_: Iterable[LocalState | None]) -> dict[TargetId, LocalState]:
    return {m.target: s for m, s in zip(chain.targets, locals_, strict=True) if s is not None}


def every_case(replicas: int) -> Iterator[tuple[Chain, dict[TargetId, LocalState]]]:
    for states in itertools.product(PublicState, repeat=replicas):
        chain = make(states)
        for locals_ in itertools.product(LOCALS, repeat=replicas):
            yield chain, local_of(chain, locals_)


def states_of(chain: Chain) -> dict[TargetId, PublicState]:
    return {m.target: m.state for m in chain.targets}


def those(chain: Chain, state: PublicState) -> list[TargetId]:
    return [m.target for m in chain.targets if m.state == state]


def check_rules(old: Chain, local: Mapping[TargetId, LocalState], new: Chain) -> None:
    before, after = states_of(old), states_of(new)
    assert sorted(before) == sorted(after), "no target is gained or lost"
    assert (new is old) == (new.version == old.version), "the version rises iff something changed"
    assert new is old or new.version == old.version + 1, "the version rises by one"
    assert new is old or new.targets != old.targets, "a new version differs"
    assert len(those(new, Y)) <= 1 or new is old, "at most one is SYNCING"
    groups = [GROUP_ORDER.index(m.state) for m in new.targets]
    assert new is old or groups == sorted(groups), "groups stand in order"
    serving, served = those(new, S), those(old, S)
    kept = [t for t in served if t in serving]
    assert [t for t in serving if t in kept] == kept, "SERVING targets keep their order"
    if served:
        assert set(serving) & set(served) or (not serving and set(those(new, L)) == set(served)), (
            "the last complete replicas become LASTSRV and nothing else, all of them"
        )
        for target in served:
            if local.get(target) != OFF:
                assert after[target] == S, "a SERVING target that is not lost stays"
            elif kept:
                assert after[target] == O, "lost while another serves: OFFLINE"
    for target in set(serving) - set(served):
        if before[target] == Y:
            assert local[target] == UP, "filled: it said so"
            assert kept, "filled: from somebody who still serves"
        else:
            assert before[target] == L, "unfilled targets serve only from LASTSRV"
            assert not served, "and only when nobody served meanwhile"
            assert local.get(target) in (UP, ON), "and only when they are back"
            assert len(serving) == 1, "and only one of them"
    assert not (serving and those(new, L)), "LASTSRV is over when somebody serves"
    for target, state in after.items():
        if local.get(target) == OFF:
            assert state in (L, O), "who is not there neither serves nor is filled nor waits"
        if state == L:
            assert before[target] in (S, L), "LASTSRV comes from SERVING"
        if state == Y:
            assert serving, "who is filled has a source"
    if serving and not those(new, Y):
        waiting = [t for t in those(new, W) if local.get(t) in (UP, ON)]
        assert not waiting, "nobody waits while the place of the SYNCING is free"


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_every_state_keeps_every_rule(replicas: int) -> None:
    for old, local in every_case(replicas):
        check_rules(old, local, next_chain(old, local))


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_r12_a_chain_says_since_when_what_was_not_flushed_may_be_gone(replicas: int) -> None:
    """Exactly when a doubtful replica brings it back; and none does where another one can."""
    for plain, local in every_case(replicas):
        old = msgspec.structs.replace(plain, lost=ChainVersion(3))
        for count in range(replicas + 1):
            for doubtful in itertools.combinations([m.target for m in old.targets], count):
                new = next_chain(old, local, doubtful)
                check_rules(old, local, new)
                returned = [t for t in those(new, S) if states_of(old)[t] == L]
                losing = bool(set(returned) & set(doubtful))
                assert new.lost == (new.version if losing else 3)
                if losing:
                    able = [t for t in those(old, L) if local.get(t) in (UP, ON)]
                    assert set(able) <= set(doubtful)


def reachable(replicas: int) -> set[Chain]:
    """All chains (version put aside) that a new chain can ever become."""
    start = make([S] * replicas)
    seen = {start.targets}
    todo = [start]
    while todo:
        chain = todo.pop()
        for locals_ in itertools.product(LOCALS, repeat=replicas):
            new = next_chain(chain, local_of(chain, locals_))
            if new.targets not in seen:
                seen.add(new.targets)
                todo.append(Chain(new.id, ChainVersion(7), new.targets))
    return {Chain(ChainId(1), ChainVersion(7), targets) for targets in seen}


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_reachable_chains_have_a_complete_replica(replicas: int) -> None:
    for chain in reachable(replicas):
        check_chain(chain)
        assert those(chain, S) or those(chain, L)


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("stale", [ON, UP])
def test_r2_r8_no_state_is_without_an_exit(replicas: int, stale: LocalState) -> None:
    """From every state of a chain there is a way back to serving with all replicas.

    Once all are healthy and filling ends, the chain serves in full after a few steps.

    `stale` is what those say that are not being filled: an old UPTODATE must not hold them back.
    """
    for start in reachable(replicas):
        chain = start
        for _ in range(2 * replicas + 1):
            local = {m.target: UP if m.state == Y else stale for m in chain.targets}
            chain = next_chain(chain, local)
        assert set(states_of(chain).values()) == {S}, f"stuck from {start} at {chain}"
        local = {m.target: UP for m in chain.targets}
        assert next_chain(chain, local) is chain


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_r7_whoever_returns_first_brings_the_chain_back(replicas: int) -> None:
    """After an outage of all, whichever complete replica returns first brings the chain back."""
    chain = make([S] * replicas)
    down = next_chain(chain, {m.target: OFF for m in chain.targets})
    assert those(down, L) == [m.target for m in chain.targets]
    for first in those(down, L):
        local = {m.target: ON if m.target == first else OFF for m in down.targets}
        assert those(next_chain(down, local), S) == [first]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_constant_input_settles(replicas: int) -> None:
    for start, local in every_case(replicas):
        chain = start
        for _ in range(5):
            chain = next_chain(chain, {t: ON if s == UP else s for t, s in local.items()})
        settled = next_chain(chain, {t: ON if s == UP else s for t, s in local.items()})
        assert settled is chain


@pytest.mark.parametrize("seed", range(20))
def test_random_walk(seed: int) -> None:
    generator = random.Random(seed)
    chain = make([S] * generator.choice([1, 2, 3, 4, 5]))
    for _ in range(2000):
        local = local_of(chain, [generator.choice(LOCALS) for _ in chain.targets])
        new = next_chain(chain, local)
        check_rules(chain, local, new)
        chain = check_chain(new)


def test_table_is_complete() -> None:
    assert set(TABLE) == set(itertools.product(PublicState, LOCALS))


def golden_rows() -> Iterator[str]:
    yield "# chain of 1 to 3 replicas: public states and local reports -> next public states"
    yield "# S serving L lastsrv Y syncing W waiting O offline | u uptodate o online - gone"
    yield "# digits: place in the old chain. Rewrite: python tests/unit/test_mgmtd_chain.py"
    for replicas in (1, 2, 3):
        for old in sorted(reachable(replicas), key=render):
            for locals_ in itertools.product((UP, ON, OFF), repeat=replicas):
                new = next_chain(old, local_of(old, locals_))
                reports = "".join(LOCAL_LETTERS[s] for s in locals_)
                states = "".join(LETTERS[m.state] for m in old.targets)
                places = {m.target: str(n) for n, m in enumerate(old.targets)}
                result = " ".join(LETTERS[m.state] + places[m.target] for m in new.targets)
                row = f"{states} {reports} -> {result}"
                yield row + ("" if new is not old else " =")


def render(chain: Chain) -> str:
    states = "".join(LETTERS[m.state] for m in chain.targets)
    return states + "".join(str(m.node) for m in chain.targets)


def golden_text() -> str:
    return "\n".join(dict.fromkeys(golden_rows())) + "\n"


def test_golden_table() -> None:
    assert GOLDEN.read_text() == golden_text(), "read the diff; then rewrite the golden table"


if __name__ == "__main__":
    GOLDEN.write_text(golden_text())
