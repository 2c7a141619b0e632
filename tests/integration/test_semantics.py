"""docs/semantics.md on a real mount of a real cluster: the same cases that hold on a local one."""

from pathlib import Path

import pytest

from integration.harness import LocalCluster
from semantics import posix_acls
from semantics.posix_cases import Case, cases


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.__name__)
def test_on_a_real_mount(case: Case, shared: LocalCluster) -> None:
    place: Path = shared.mount / case.__name__
    place.mkdir()
    place.chmod(0o777)
    case(place)


def test_acl_cases_are_not_skipped(shared: LocalCluster) -> None:
    assert posix_acls.has_acls(shared.mount)
