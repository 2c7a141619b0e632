"""The simulator can fail: every named way to break the code is noticed by the rule it violates.

Each has a situation that it does not survive, which hangs on no dice (pinned.DIRECTED). Many are
also noticed by the dice of a mood, at pinned seeds (pinned.PINNED; found with
`python -m sim.mutations`); where dice have moved, a few other seeds are tried. EMBERFS_SIM=long
also runs the seeds that take long.
"""

import os

import pytest

from sim import situations
from sim.mutations import MUTATIONS, Patch, load, run_mutation
from sim.pinned import DIRECTED, PINNED, SLOW
from sim.scenario import quiet_burial

load()
TRIES = 2  # further seeds, should the pinned one not notice any more


def test_every_mutation_is_noticed_by_something() -> None:
    """The list covers replication, disks, management, metadata and the clients; nothing escapes."""
    assert {*DIRECTED, *PINNED} == set(MUTATIONS)
    assert set(SLOW) <= set(PINNED)
    assert all(mutation.breaks for mutation in MUTATIONS.values())


def test_every_situation_is_fatal_to_something() -> None:
    """None stands there for nothing."""
    assert set(DIRECTED.values()) == set(situations.load_all())


def test_patches_are_taken_back() -> None:
    """A mutation leaves nothing behind: the next test runs the code as it is."""

    class Owner:
        kept = 1

    class Heir(Owner):
        pass

    patch, table = Patch(), {"key": 1}
    patch.set(Owner, "kept", 2)
    patch.set(Heir, "kept", 3)
    patch.put(table, "key", 2)
    patch.wrap(Owner, "kept", lambda original: original + 10)
    assert (Owner.kept, Heir.kept, table["key"]) == (12, 3, 2)
    patch.undo()
    assert (Owner.kept, Heir.kept, table["key"]) == (1, 1, 1)
    assert "kept" not in vars(Heir)


def test_a_patch_of_what_is_not_there_is_refused() -> None:
    """A mutation that the product has left behind must not pass for one that nobody notices."""

    class Owner:
        def call(self, length: int) -> None:
            pass

    patch = Patch()
    with pytest.raises(AttributeError):
        patch.set(Owner, "gone", 1)
    with pytest.raises(AssertionError, match="called otherwise"):
        patch.set(Owner, "call", lambda self: None)
    patch.set(Owner, "call", lambda *_: None)
    patch.undo()


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_mutation_applies(name: str) -> None:
    """What it replaces is there, and is called as it expects."""
    with MUTATIONS[name].applied():
        pass


@pytest.mark.parametrize("name", sorted(DIRECTED))
def test_mutation_does_not_survive_its_situation(name: str) -> None:
    """Broken in this way, the code violates the rule that stands against it."""
    mutation = MUTATIONS[name]
    situations.load_all()
    with mutation.applied():
        outcome = situations.enact(DIRECTED[name])
    seen = {violation.rule for violation in outcome.violations}
    assert mutation.noticed(outcome), f"{mutation.breaks} Violated: {sorted(seen) or 'nothing'}"


@pytest.mark.parametrize("name", sorted(PINNED))
def test_mutation_is_noticed_by_dice(name: str) -> None:
    """The moods find it by themselves."""
    if name in SLOW and os.environ.get("EMBERFS_SIM") != "long":
        pytest.skip("takes long to notice; EMBERFS_SIM=long runs it")
    mutation, seen = MUTATIONS[name], set()
    for seed, mood in [PINNED[name], *list(mutation.attempts(TRIES))]:
        with quiet_burial():
            outcome = run_mutation(mutation, seed, mood)
        if mutation.noticed(outcome):
            return
        seen |= {violation.rule for violation in outcome.violations}
    pytest.fail(f"{mutation.breaks} Nobody noticed; violated: {sorted(seen) or 'nothing'}")
