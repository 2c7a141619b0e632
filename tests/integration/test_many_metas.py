"""Two real metadata servers on one store: killed and frozen under loads that verify everything."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration import names
from integration.harness import LocalCluster, wait_until
from integration.writer import Writer
from kv_servers import Etcd, Postgres

LEASE_S = 5.0
PAUSE_MAX_S = LEASE_S + 10  # of one operation; room for a shared machine


@contextmanager
def store_of(kind: str) -> Iterator[str]:
    """A store of a kind, by its URL."""
    if kind == "etcd":
        server = Etcd(1)
        try:
            yield f"etcd://{server.hosts}/many"
        finally:
            server.stop()
    else:
        postgres = Postgres()
        try:
            yield postgres.url
        finally:
            postgres.stop()


class Loads:
    """Names and file contents that change all the time, each compared with a model."""

    def __init__(self, cluster: LocalCluster, root: Path) -> None:
        script = names.__file__
        self._all = [
            Writer(cluster.mount / "n1", root / "n1.p", 1, script),
            Writer(cluster.mount / "n2", root / "n2.p", 2, script),
            Writer(cluster.mount / "w", root / "w.p", 3),
        ]

    def go_on(self, rounds: int = 3) -> None:
        """Wait until everyone has done some more operations."""
        before = [load.rounds for load in self._all]
        for load, done in zip(self._all, before, strict=True):
            wait_until(lambda one=load, n=done: one.rounds >= n + rounds, 40)

    @property
    def longest_s(self) -> float:
        return max(load.longest_s for load in self._all)

    def finish(self) -> None:
        """Fail the test if one saw an error, a loss or a double."""
        for load in self._all:
            load.finish()

    def kill(self) -> None:
        for load in self._all:
            load.kill()


@pytest.mark.parametrize("kind", ["etcd", "postgres"])
def test_r9_o11_metadata_servers_are_killed_and_frozen_in_turn(
    unstarted: LocalCluster, tmp_path: Path, kind: str
) -> None:
    """No application sees an error, and nothing is lost or done twice, whichever of two fails."""
    cluster = unstarted
    with store_of(kind) as url:
        cluster.up("--store", url, "--meta", 2)
        status = cluster.status()
        assert sum(" meta " in line and "alive" in line for line in status.splitlines()) == 2
        loads = Loads(cluster, tmp_path)
        try:
            loads.go_on()
            for killed in ("meta", "meta2", "meta", "meta2"):
                cluster.kill(killed)
                loads.go_on()
                cluster.start(killed)
                wait_until(lambda: "dead" not in cluster.status(), 20, pause_s=0.3)
            print(f"\n{kind}: kill -9 delayed an operation by {loads.longest_s:.1f} s at most")
            for frozen in ("meta2", "meta"):
                pid = cluster.pid(frozen)
                os.kill(pid, signal.SIGSTOP)
                time.sleep(LEASE_S + 2)
                loads.go_on()
                os.kill(pid, signal.SIGCONT)
                wait_until(lambda: "dead" not in cluster.status(), 20, pause_s=0.3)
                loads.go_on()
            print(f"{kind}: the longest operation of all took {loads.longest_s:.1f} s")
            assert loads.longest_s < PAUSE_MAX_S
            loads.finish()
        finally:
            loads.kill()
        cluster.fsck()


def test_several_metadata_servers_without_a_store_are_refused(unstarted: LocalCluster) -> None:
    """One clear error, before anything is started."""
    done = unstarted.emberfs("up", "--meta", 2, "--no-mount", check=False)
    assert done.returncode == 1
    assert "need one store that all of them reach" in done.stderr
    assert done.stderr.count("\n") == 1
