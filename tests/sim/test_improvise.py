"""Improvised scripts in CI: a few of each theme, and dice that notice what is broken."""

import pytest

from sim.improvise import THEMES, improvise
from sim.mutations import load
from sim.violation import report

SEEDS = 8
# What the first scripts notice; every other mutation has its situation.
NOTICED = (
    "acknowledged_before_successor",
    "commit_before_forward",
    "failed_forward_is_taken_back",
    "pending_version_is_answered",
    "successor_is_left_out",
)


@pytest.mark.parametrize("theme", sorted(THEMES))
def test_no_script_violates_a_promise(theme: str) -> None:
    for seed in range(SEEDS):
        found = improvise(seed, theme).violations
        assert not found, f"python -m sim.improvise --first {seed} --count 1\n{report(found)}"


@pytest.mark.parametrize("name", NOTICED)
def test_dice_notice_what_is_broken(name: str) -> None:
    mutation = load()[name]
    for seed in range(SEEDS):
        for theme in THEMES:
            with mutation.applied():
                outcome = improvise(seed, theme)
            if mutation.noticed(outcome):
                return
    pytest.fail(f"{mutation.breaks} No script noticed.")
