"""The POSIX cases through the kernel, FUSE and our translation, on a cluster in memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from semantics.mounting import mounted, needs_fuse
from semantics.posix_cases import Case, cases, simple_cases


@pytest.fixture(scope="module", params=["plain", "writeback"])
def mount(request, tmp_path_factory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("mount")
    words = [] if request.param == "plain" else [request.param]
    with mounted(place, *words) as daemon:
        yield daemon.place


@pytest.fixture(scope="module")
def real_meta_mount(tmp_path_factory) -> Iterator[Path]:
    with mounted(tmp_path_factory.mktemp("mount"), "real") as daemon:
        yield daemon.place


@needs_fuse
@pytest.mark.parametrize("case", simple_cases(), ids=lambda case: case.__name__)
def test_on_memory_mount(case: Case, mount: Path) -> None:
    _run(case, mount)


@needs_fuse
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.__name__)
def test_on_real_meta(case: Case, real_meta_mount: Path) -> None:
    _run(case, real_meta_mount)


def _run(case: Case, mount: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root: other users must get in")
    for directory in [mount, *mount.parents][:4]:
        directory.chmod(0o755)
    root = mount / case.__name__
    root.mkdir()
    case(root)
