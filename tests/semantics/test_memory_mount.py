"""The POSIX cases through the kernel, FUSE and our translation, on a cluster in memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from semantics import posix_acls
from semantics.mounting import mounted, needs_fuse
from semantics.posix_cases import Case, cases, simple_cases
from semantics.posix_tools import ALICE, BOB, make_file, open_place, opened


@pytest.fixture(scope="module", params=["plain", "writeback"])
def mount(request) -> Iterator[Path]:
    words = [] if request.param == "plain" else [request.param]
    with open_place() as place, mounted(place, *words) as daemon:
        yield daemon.place


@pytest.fixture(scope="module")
def real_meta_mount() -> Iterator[Path]:
    with open_place() as place, mounted(place, "real") as daemon:
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
    root = mount / case.__name__
    root.mkdir()
    case(root)


@needs_fuse
def test_acl_cases_are_not_skipped(real_meta_mount: Path) -> None:
    assert posix_acls.has_acls(real_meta_mount)


@needs_fuse
def test_gathered_writes_of_who_does_not_own_the_file() -> None:
    """With writeback the kernel tells times of its own, which only owners may set."""
    with open_place() as place, mounted(place, "real", "writeback"):
        path = make_file(place / "f", ALICE, 0o666, b"0123456789")

        def write() -> None:
            with opened(path, os.O_RDWR) as fd:
                os.write(fd, b"new")
                os.fsync(fd)

        BOB.may(write)
        BOB.may(lambda: os.truncate(path, 5))
        assert path.read_bytes() == b"new34"
