"""The model of the chain protocol: clean within its bounds, and able to find what is wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run.py"
CI_S_MAX = 240  # well under a minute of one free core; a shared one is slower

needs_spin = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")),
    reason="THE PROTOCOL MODEL WAS NOT CHECKED: it needs spin and gcc (apt-get install spin gcc)",
)


@needs_spin
def test_the_chain_protocol_keeps_its_promises_and_every_mutation_is_caught() -> None:
    """Linearizable reads, no acknowledged write lost, exactly once, every run ends complete."""
    done = subprocess.run(
        [sys.executable, str(RUN), "ci"],
        capture_output=True,
        text=True,
        timeout=CI_S_MAX,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "searches, 0 not as they should be" in done.stdout
