"""Fixtures: one cluster for the tests that only use it, a fresh one for those that break it."""

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.harness import LocalCluster, local_cluster


@pytest.fixture(scope="module")
def shared() -> Iterator[LocalCluster]:
    """A mounted cluster shared by the tests of one file."""
    with local_cluster() as cluster:
        cluster.up()
        yield cluster


@pytest.fixture
def fresh() -> Iterator[LocalCluster]:
    """A mounted cluster of one test's own."""
    with local_cluster() as cluster:
        cluster.up()
        yield cluster


@pytest.fixture
def unstarted() -> Iterator[LocalCluster]:
    """A cluster that the test starts itself."""
    with local_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module", autouse=True)
def alone_in_shared_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Files about 3FS's programs, which count what is in /dev/shm, wait for each other."""
    if "hf3fs" not in request.module.__name__:
        yield
        return
    with (Path(tempfile.gettempdir()) / "emberfs-hf3fs-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
