"""The simulator can fail: every named way to break the code is noticed by the rule it violates.

The seeds that notice each are pinned (pinned.py; found with `python -m sim.mutations`). A mutation
without a pin is one that no seed has noticed within its bound yet: a gap of the simulator, or a
change that another part of the protocol makes harmless. EMBERFS_SIM=long also runs the slow ones.
"""

import os

import pytest

from sim.mutations import MUTATIONS, Patch, load, run_mutation
from sim.pinned import PINNED, SLOW, UNNOTICED
from sim.scenario import quiet_burial

load()
TRIES = 2  # further seeds, should the pinned one not notice any more


def test_there_are_enough_mutations() -> None:
    """The list covers the replication protocol, the disk, the management and the clients."""
    assert len(PINNED) >= 25
    assert {*PINNED, *UNNOTICED} == set(MUTATIONS)
    assert all(mutation.breaks for mutation in MUTATIONS.values())


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


@pytest.mark.parametrize("name", sorted(PINNED))
def test_mutation_is_noticed(name: str) -> None:
    """Broken in this way, the code violates the rule that stands against it."""
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
