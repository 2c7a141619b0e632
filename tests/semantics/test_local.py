"""The POSIX cases on a local file system: if one fails here, the case is wrong."""

import os

import pytest

from semantics.posix_cases import Case, cases


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.__name__)
def test_on_local_file_system(case: Case, tmp_path) -> None:
    if getattr(case, "needs_root", False):
        if os.geteuid():
            pytest.skip("needs root")
        for directory in [tmp_path, *tmp_path.parents][:4]:  # other users must get in
            directory.chmod(0o755)
    case(tmp_path)
