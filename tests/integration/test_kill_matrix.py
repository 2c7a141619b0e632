"""The kill matrix in the form for CI: some cells once; EMBERFS_FAULTS=long: every cell.

Figures over many repetitions: make kill-matrix REPEAT=20.
"""

import os
from collections.abc import Iterator

import pytest

from integration import kill_matrix
from integration.harness import LocalCluster

SEED = 1
LONG = os.environ.get("EMBERFS_FAULTS") == "long"
KILLED = kill_matrix.ROLES if LONG else ("head", "middle", "tail", "meta")
FROZEN = kill_matrix.ROLES if LONG else ("head", "tail")
# Promises with room for a shared machine; kill_matrix.py prints the figures beside the limits.
WRITES_MAX_S = kill_matrix.WRITES_LIMIT_S + 4
READS_MAX_S = 4.0


@pytest.fixture(scope="module")
def chain() -> Iterator[LocalCluster]:
    """One chain of three storages for all cells."""
    with kill_matrix.one_chain() as cluster:
        yield cluster


@pytest.mark.parametrize("role", KILLED)
def test_r9_r7_killed_in_every_role(chain: LocalCluster, role: str) -> None:
    """No application sees an error, a loss or a lie when a service is killed, whatever its role."""
    found = kill_matrix.outage(chain, role, "kill", SEED)
    # Without mgmtd, storages stop serving at half their lease: then its absence counts.
    absence_s = found.outage_s if role == "mgmtd" else 0.0
    assert found.writes_s < WRITES_MAX_S + absence_s
    assert found.reads_s < READS_MAX_S + absence_s


@pytest.mark.parametrize("role", FROZEN)
def test_o15_r9_frozen_past_the_lease_in_every_role(chain: LocalCluster, role: str) -> None:
    """A server that accepts and never answers is a pause, and its late writes change nothing."""
    found = kill_matrix.outage(chain, role, "freeze", SEED)
    absence_s = found.outage_s if role == "mgmtd" else 0.0
    assert found.writes_s < WRITES_MAX_S + absence_s
    assert found.reads_s < READS_MAX_S + absence_s


def test_o2_c10_late_writes_of_a_frozen_client_are_fenced(chain: LocalCluster) -> None:
    """A client that wakes behind its lease overwrites nothing that was written meanwhile."""
    kill_matrix.frozen_client(chain, SEED)


def test_r5_reads_go_on_during_a_rolling_restart(chain: LocalCluster) -> None:
    """Restarting every storage in turn costs readers no error and no long wait."""
    assert kill_matrix.rolling_restart(chain, SEED) < READS_MAX_S
