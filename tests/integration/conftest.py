"""Fixtures: one cluster for the tests that only use it, a fresh one for those that break it."""

from collections.abc import Iterator

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
