"""The simulator in CI: 200 seeds without a violation, and one seed is one history."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sim.lastwords import last_words
from sim.moods import MOODS
from sim.mutations import load
from sim.run import Outcome, simulate, tell
from sim.scenario import quiet_burial

TESTS = Path(__file__).resolve().parent.parent
SEEDS = 200
SECONDS = 4.5  # of faults in each
SLICES = 8
FILE_SEEDS = 64  # of names and files: eight of each mood
FILE_SLICES = 4


def _simulate(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=TESTS,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.parametrize("part", range(SLICES))
def test_no_seed_violates_a_promise(part: int) -> None:
    count = SEEDS // SLICES
    ran = _simulate(
        "sim.many",
        str(count),
        "--first",
        str(part * count),
        "--seconds",
        str(SECONDS),
        "--jobs",
        "1",
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-4000:]
    assert f"{count} histories" in ran.stdout


@pytest.mark.parametrize("part", range(FILE_SLICES))
def test_no_seed_of_names_and_files_violates_a_promise(part: int) -> None:
    count = FILE_SEEDS // FILE_SLICES
    seeds = (str(count), "--first", str(part * count), "--seconds", str(SECONDS))
    ran = _simulate("sim.many", *seeds, "--jobs", "1", "--kinds", "files")
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-4000:]
    assert f"{count} histories" in ran.stdout


@pytest.mark.parametrize("mood", ["everything", "power", "disk", "meta storm", "files blackout"])
def test_one_seed_is_one_history(mood: str) -> None:
    """In another process too: nothing hangs on addresses in memory or the time of day."""
    told = {_simulate("sim.run", "7", "--mood", mood, "--seconds", "10").stdout for _ in range(2)}
    assert len(told) == 1
    assert "digest" in told.pop()


def test_another_seed_is_another_history() -> None:
    told = [_simulate("sim.run", seed, "--mood", "calm", "--seconds", "3").stdout for seed in "12"]
    assert told[0].split("digest")[1] != told[1].split("digest")[1]


def test_a_failing_seed_tells_how_to_repeat_it_and_what_every_server_said_last() -> None:
    """Whoever reads it sees the violation, the faults, the machines' last lines, the command."""

    def play() -> Outcome:
        return simulate(0, MOODS["gentle"], 8)

    with load()["successor_is_left_out"].applied(), quiet_burial():
        outcome = play()
        assert outcome.violations
        text = tell(outcome, last_words(play))
    assert "again: make sim SEED=0 MOOD='gentle' SECONDS=8" in text
    _, _, rest = text.partition("what every machine said last:\n")
    said = [line for line in rest.splitlines() if not line.startswith("again")]
    assert {"stor1", "stor2", "stor3"} < {line.split()[1].partition(".")[0] for line in said}
