"""Lives of programs that use 3FS's interface: what they leave behind, forks, other users."""

import ctypes
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest

from hf3fs_library import compile_program, installed, opened
from integration.harness import LocalCluster, wait_until

PROGRAM = Path(__file__).with_name("hf3fs_program.c")
OWN_LINKS = Path(f"/dev/shm/emberfs-hf3fs-{os.geteuid()}")
NOBODY = 65534
KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def place(shared: LocalCluster, request: pytest.FixtureRequest) -> Path:
    path = shared.mount / request.node.name
    path.mkdir()
    return path


@pytest.fixture
def mp(shared: LocalCluster) -> str:
    return str(shared.mount)


@pytest.fixture(scope="module")
def io() -> Any:
    installed()
    return importlib.import_module("hf3fs_fuse.io")


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    made = SharedMemory(create=True, size=4 * MiB)
    yield made
    made.close()
    made.unlink()


def links(mp: str) -> set[str]:
    virtual = Path(mp, "3fs-virt", "iovs")
    return {
        path.name for place in (virtual, OWN_LINKS) if place.is_dir() for path in place.iterdir()
    }


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(("emberfs-iov-", "psm_"))}


def test_a_thousand_lives_leave_nothing(io: Any, place: Path, mp: str) -> None:
    described = importlib.import_module("hf3fs_py_usrbio._library")
    create = described.lib.hf3fs_iovcreate
    create.argtypes = [ctypes.c_void_p, ctypes.c_char_p, *[ctypes.c_size_t] * 2, ctypes.c_int]

    def life(path: Path) -> None:
        memory = SharedMemory(create=True, size=64 * KiB)
        iov, ring = io.make_iovec(memory, mp), io.make_ioring(mp, 4)
        memory.unlink()
        with opened(io, path) as fd:
            for start in range(0, 64 * KiB, 16 * KiB):
                ring.prepare(iov[start : start + 16 * KiB], True, fd, start)
            ring.submit().wait(min_results=2)  # two are left when it is destroyed
        del iov, ring
        memory.close()
        own = described.Iov()
        assert create(ctypes.addressof(own), mp.encode(), 64 * KiB, 0, -1) == 0
        described.lib.hf3fs_iovdestroy(ctypes.c_void_p(ctypes.addressof(own)))

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    (place / "file").write_bytes(b"x" * 64 * KiB)
    life(place / "file")
    wait_until(lambda: threads() == 0, 10)
    files, names, linked = open_files(), shared_memory(), links(mp)
    for _ in range(1000):
        life(place / "file")
    assert (open_files(), shared_memory(), links(mp)) == (files, names, linked)
    assert threads() <= 8
    wait_until(lambda: threads() == 0, 10)  # they go when nothing was to do for a second


def threads() -> int:
    """Threads of the library in this process."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("hf3fs-io")


def test_what_a_killed_program_leaves_is_swept(mp: str) -> None:
    """Memory of a killed program goes when the next one makes a buffer; not that of a live one."""
    program = f"""
import ctypes, time
from hf3fs_py_usrbio._library import lib, Iov
iov = Iov()
assert lib.hf3fs_iovcreate(ctypes.byref(iov), {mp!r}.encode(), ctypes.c_size_t(1 << 20),
                           ctypes.c_size_t(0), -1) == 0
print("made", flush=True)
time.sleep(100)
"""
    children: list[subprocess.Popen[str]] = []

    def start() -> None:
        child = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(installed())},
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "made\n"

    try:
        before = shared_memory(), links(mp)
        start()
        start()
        assert len(shared_memory() - before[0]) == len(links(mp) - before[1]) == 2
        children[0].kill()
        children[0].wait()
        start()
        assert len(shared_memory() - before[0]) == len(links(mp) - before[1]) == 2
    finally:
        for child in children:
            child.kill()
            child.communicate()
        for name in shared_memory() - before[0]:
            os.unlink(f"/dev/shm/{name}")
        for name in links(mp) - before[1]:
            os.unlink(OWN_LINKS / name)


def use_in_child(io: Any, iov: Any, ring: Any, fd: int, path: str) -> None:
    (done,) = ring.prepare(iov[:8], True, fd, 0).submit().wait(min_results=1)
    assert done.result == 8
    io.deregister_fd(fd)
    assert io.read_file(path, block_size=KiB) == b"x" * 100


def test_a_forked_child_works(io: Any, place: Path, mp: str, memory: SharedMemory) -> None:
    """As torch's DataLoader forks: rings and files go on in both, links stay the parent's."""
    path = place / "file"
    path.write_bytes(b"x" * 100)
    iov, ring = io.make_iovec(memory, mp), io.make_ioring(mp, 4)
    with opened(io, path) as fd:
        ring.prepare(iov[:100], True, fd, 0).submit()
        child = multiprocessing.get_context("fork").Process(
            target=use_in_child, args=(io, iov, ring, fd, str(path))
        )
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert os.path.islink(iov.link)
        assert ring.wait(min_results=1)[0].result == 100
        assert ring.prepare(iov[:9], True, fd, 0).submit().wait(min_results=1)[0].result == 9


def test_another_user_than_root(shared: LocalCluster, place: Path, mp: str) -> None:
    """Who may use the mount may use the interface; buffers and links are that user's own."""
    program = compile_program(PROGRAM, shared.root / "program", "-std=gnu11", "-O2")
    place.chmod(0o777)
    try:
        done = subprocess.run(
            [program, place, mp],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "all is as documented\n"), done.stderr
        assert not os.listdir(f"/dev/shm/emberfs-hf3fs-{NOBODY}")
    finally:
        shutil.rmtree(f"/dev/shm/emberfs-hf3fs-{NOBODY}", ignore_errors=True)
        program.unlink()


def test_a_directory_for_links_that_is_not_ours_is_not_used(
    io: Any, mp: str, memory: SharedMemory
) -> None:
    """/dev/shm is everybody's; who made our directory first shall not get our links."""
    moved = OWN_LINKS.with_name("hf3fs-test-aside")
    if OWN_LINKS.exists():
        OWN_LINKS.rename(moved)
    described = importlib.import_module("hf3fs_py_usrbio._library")
    own = described.Iov()
    size = ctypes.c_size_t(4096)
    try:
        OWN_LINKS.mkdir()
        os.chown(OWN_LINKS, NOBODY, NOBODY)
        with pytest.raises(PermissionError):
            io.make_iovec(memory, mp)
        at = ctypes.c_void_p(ctypes.addressof(own))
        assert described.lib.hf3fs_iovcreate(at, mp.encode(), size, ctypes.c_size_t(0), -1) == -1
        assert not list(OWN_LINKS.iterdir())
    finally:
        OWN_LINKS.rmdir()
        if moved.exists():
            moved.rename(OWN_LINKS)


def test_the_cluster_is_clean_afterwards(shared: LocalCluster) -> None:
    os.sync()
    shared.fsck()
