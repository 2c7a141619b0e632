"""The POSIX cases on a local file system: if one fails here, the case is wrong."""

import os

import pytest

from semantics.posix_cases import Case, cases
from semantics.posix_tools import open_place


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.__name__)
def test_on_local_file_system(case: Case) -> None:
    if getattr(case, "needs_root", False) and os.geteuid():
        pytest.skip("needs root")
    with open_place() as place:
        case(place)
