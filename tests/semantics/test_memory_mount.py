"""The POSIX cases through the kernel, FUSE and our translation, on a cluster in memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from semantics.mounting import mounted, needs_fuse
from semantics.posix_cases import Case, cases


@pytest.fixture(scope="module", params=["plain", "writeback", "real"])
def mount(request, tmp_path_factory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("mount")
    words = [] if request.param == "plain" else [request.param]
    with mounted(place, *words) as daemon:
        yield daemon.place


@needs_fuse
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.__name__)
def test_on_memory_mount(case: Case, mount: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root: other users must get in")
    for directory in [mount, *mount.parents][:4]:
        directory.chmod(0o755)
    root = mount / case.__name__
    root.mkdir()
    case(root)
