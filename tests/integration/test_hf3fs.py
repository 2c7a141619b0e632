"""What programs of 3FS call, on a real mount: each function and each error, from Python and C."""

import ctypes
import errno
import importlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest

from hf3fs_library import SOURCE, compile_program, installed, library, opened
from integration.harness import LocalCluster, run

PROGRAM = Path(__file__).with_name("hf3fs_program.c")
KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def place(shared: LocalCluster, request: pytest.FixtureRequest) -> Path:
    path = shared.mount / request.node.name.replace("[", "-").replace(" ", "-").strip("]")
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
    """Shared memory whose name goes at once, as most programs do it after make_iovec."""
    made = SharedMemory(create=True, size=4 * MiB)
    yield made
    made.close()
    made.unlink()


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(("emberfs-iov-", "psm_"))}


def failure(expected: int, call: Any, *arguments: Any, **named: Any) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments, **named)
    assert caught.value.errno == expected
    assert caught.value.strerror == os.strerror(expected)


@pytest.mark.parametrize(
    "how", ["", "mount", "one thread", "no threads", "address,undefined", "thread"]
)
def test_a_c_program(place: Path, mp: str, tmp_path: Path, how: str) -> None:
    """Everything that the header says: on rings and without, with few threads, in sanitizers."""
    sanitizer = how if how in ("address,undefined", "thread") else ""
    program = tmp_path / "program"
    if sanitizer:
        include = SOURCE / "hf3fs_py_usrbio" / "include"
        sources = [path for path in (SOURCE / "native").glob("*.c") if path.name != "window.c"]
        flags = ["-std=gnu11", "-g", "-O1", f"-fsanitize={sanitizer}", "-pthread"]
        run("gcc", *flags, f"-I{include}", PROGRAM, *sources, "-o", program)
    else:
        without = ["-DWITHOUT_THREADS"] if how == "no threads" else []
        compile_program(PROGRAM, program, "-std=gnu11", "-O2", *without)
    # One: most I/O has not started when its ring is destroyed.
    few = how in ("one thread", "address,undefined")
    settings = {"EMBERFS_HF3FS_THREADS": "1"} if few else {}
    if how == "mount":
        settings["EMBERFS_HF3FS_RINGS"] = "0"
    done = subprocess.run(
        [program, place, mp],
        env={**os.environ, **settings, "TSAN_OPTIONS": "die_after_fork=0:halt_on_error=1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "all is as documented\n"), done.stderr


def test_mount_points(io: Any, place: Path, mp: str) -> None:
    assert io.extract_mount_point(str(place)) == mp
    assert io.extract_mount_point(mp) == mp
    (place / "link").symlink_to(place)
    assert io.extract_mount_point(path=str(place / "link" / "..")) == mp
    with pytest.raises(RuntimeError):
        io.extract_mount_point(str(place / "nothing"))


def test_a_mount_point_with_odd_characters(io: Any, shared: LocalCluster) -> None:
    """The kernel writes blanks and backslashes of mount points in octal."""
    odd = shared.root / "a b\\c"
    odd.mkdir()
    run("mount", "--bind", shared.mount, odd)
    try:
        assert io.extract_mount_point(str(odd)) == str(odd)
    finally:
        run("umount", odd)


def test_what_is_mounted_inside_is_not_ours(io: Any, place: Path) -> None:
    (place / "inside").mkdir()
    run("mount", "-t", "tmpfs", "none", place / "inside")
    try:
        assert io.extract_mount_point(str(place / "inside")) is None
        with (place / "inside" / "file").open("wb") as file:
            failure(errno.EBADF, io.register_fd, file.fileno())
    finally:
        run("umount", place / "inside")


def test_registering(io: Any, place: Path) -> None:
    with opened(io, place / "file") as fd:
        failure(errno.EINVAL, io.register_fd, fd)
        io.deregister_fd(fd)
        io.register_fd(fd, flags=0)


def test_the_same_object_comes_back(io: Any, place: Path, mp: str, memory: SharedMemory) -> None:
    iov = io.make_iovec(memory, mp)
    ring = io.make_ioring(mp, 8, for_read=False)
    userdata = object()
    with opened(io, place / "file") as fd:
        part = iov[10:1034]
        native = ring.prepare(part, False, fd, 5, userdata=userdata)
        assert native is ring.ior
        assert ring.submit() is native
        (back,) = native.wait(min_results=1)
        assert back is part
        assert (back.result, back.base_off) == (1024, 10)
        assert back.userdata is userdata
        (whole,) = ring.prepare(iov, False, fd, 0).submit().wait(min_results=1)
        assert whole is iov.iov
        assert os.fstat(fd).st_size == 4 * MiB
    assert native.entries == 8


def test_refused_io(io: Any, place: Path, mp: str, memory: SharedMemory) -> None:
    iov = io.make_iovec(memory, mp)
    reading, writing = io.make_ioring(mp, 2, True), io.make_ioring(mp, 2, False)
    with opened(io, place / "file") as fd:
        failure(errno.EINVAL, reading.prepare, iov[:8], False, fd, 0)
        failure(errno.EINVAL, writing.prepare, iov[:8], True, fd, 0)
        failure(errno.EINVAL, reading.prepare, iov[8:8], True, fd, 0)
        failure(errno.EINVAL, reading.prepare, iov[:8], True, fd, -1)
        failure(errno.EBADF, reading.prepare, iov[:8], True, 999, 0)
        reading.prepare(iov[:8], True, fd, 0)
        reading.prepare(iov[8:16], True, fd, 0)
        with pytest.raises(BlockingIOError):
            reading.prepare(iov[:8], True, fd, 0)
        assert len(reading.submit().wait(min_results=2)) == 2
        reading.prepare(iov[:8], True, fd, 0)
    with opened(io, place / "file", os.O_RDONLY) as fd, pytest.raises(PermissionError):
        writing.prepare(iov[:8], False, fd, 0)
    with opened(io, place / "file", os.O_WRONLY) as fd, pytest.raises(PermissionError):
        reading.prepare(iov[:8], True, fd, 0)


def test_min_max_and_timeouts(io: Any, place: Path, mp: str, memory: SharedMemory) -> None:
    iov, ring = io.make_iovec(memory, mp), io.make_ioring(mp, 8)
    assert ring.wait() == []
    assert ring.wait(min_results=3, timeout=timedelta(milliseconds=20)) == []
    assert ring.wait(min_results=1, timeout=-3.0) == []
    with pytest.raises(TypeError):
        ring.wait(min_results=1, timeout=1)
    with pytest.raises(TypeError):
        ring.wait(1)
    with opened(io, place / "file") as fd:
        for _ in range(8):
            ring.prepare(iov[:8], True, fd, 0)
        native = ring.submit()
        assert len(native.wait(max_results=2, min_results=3)) == 3  # max is at least min
        assert len(native.wait(min_results=4, timeout=30.0)) == 4
        assert 1 <= len(native.wait(max_results=8, min_results=1)) <= 1
        assert native.wait(min_results=1, timeout=0.05) == []
        for _ in range(5):
            ring.prepare(iov[:8], True, fd, 0)
        ring.submit()
        time.sleep(0.3)
        assert len(ring.wait()) == 1  # a look, for one at most
        assert len(ring.wait(max_results=3)) == 3
    ring.ior.destroy()
    ring.ior.destroy()
    failure(errno.EINVAL, ring.submit)


def test_waiting_lets_other_threads_run(io: Any, mp: str) -> None:
    ring = io.make_ioring(mp, 8)
    counted = [0]
    ended = threading.Event()

    def count() -> None:
        while not ended.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = counted[0]
    ring.wait(min_results=1, timeout=0.3)
    during = counted[0] - before
    ended.set()
    thread.join()
    assert during > 1000


def test_waiting_for_ever_ends_with_a_signal(mp: str) -> None:
    """Ctrl-C ends a program that waits for what never comes."""
    program = "import signal, sys; from hf3fs_fuse.io import make_ioring\n"
    # Whoever was started in the background of a shell is born with the signal ignored.
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "print('waits', flush=True); make_ioring(sys.argv[1], 8).wait(min_results=1)"
    child = subprocess.Popen(
        [sys.executable, "-c", program, mp],
        env={**os.environ, "PYTHONPATH": str(installed())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "waits\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=10)
        assert "KeyboardInterrupt" in told
    finally:
        child.kill()
        child.communicate()


def test_read_file(io: Any, place: Path, mp: str) -> None:
    content = random.Random(3).randbytes(2 * MiB + 77)
    path = str(place / "file")
    Path(path).write_bytes(content)
    assert io.read_file(path, block_size=MiB) == content
    assert io.read_file(path, mp, 4 * MiB, off=100) == content[100:]
    assert io.read_file(path, block_size=MiB, off=4 * MiB) == b""
    seen = []
    assert io.read_file(path, block_size=MiB, cb=lambda b, at: seen.append((at, len(b)))) is None
    assert seen == [(0, MiB), (MiB, MiB), (2 * MiB, 77)]
    seen = []

    def jump(block: memoryview, at: int) -> int | str:
        seen.append((at, bytes(block[:1])))
        return 5000 if at == 0 else "enough"

    io.read_file(path, block_size=KiB, cb=jump)
    assert seen == [(0, content[:1]), (5000, content[5000:5001])]
    with pytest.raises(ZeroDivisionError):
        io.read_file(path, block_size=KiB, cb=lambda block, at: 1 // 0)
    with pytest.raises(FileNotFoundError):
        io.read_file(str(place / "nothing"), mp)
    os.mkdir(place / "directory")
    with pytest.raises(OSError) as caught:
        io.read_file(str(place / "directory"), block_size=KiB)
    assert caught.value.args == (errno.EISDIR,)  # as upstream raises it: one argument, no errno
    assert not shared_memory()


def test_force_fsync_hardlink_and_holes(io: Any, place: Path) -> None:
    path = place / "file"
    with opened(io, path) as fd:
        os.pwrite(fd, b"x" * 3 * MiB, 0)
        assert io.force_fsync(fd) == 0
        assert os.path.getsize(path) == 3 * MiB
        io.punch_hole(fd, start=[0, 2 * MiB], end=[MiB, 3 * MiB])
    io.punch_hole(filename=str(path), start=[MiB], end=[MiB + 1], flags=0)
    assert path.read_bytes() == bytes(MiB + 1) + b"x" * (MiB - 1) + bytes(MiB)
    io.hardlink(str(path), str(place / "second"))
    assert (place / "second").stat().st_ino == path.stat().st_ino
    failure(errno.EEXIST, io.hardlink, str(path), str(place / "second"))
    failure(errno.EINVAL, io.punch_hole, str(path), [5], [4])
    failure(errno.ENOENT, io.punch_hole, str(place / "nothing"), [0], [1])


def test_a_hole_in_a_sparse_file_stays_one(io: Any, place: Path) -> None:
    path = place / "sparse"
    path.touch()
    os.truncate(path, 64 * MiB)
    io.punch_hole(str(path), [0], [64 * MiB])
    assert path.stat().st_blocks == 0


def test_links_in_the_virtual_directory(
    io: Any, shared: LocalCluster, memory: SharedMemory
) -> None:
    """Where somebody has made 3fs-virt/iovs, links are there; programs look into it."""
    iovs = shared.mount / "3fs-virt" / "iovs"
    iovs.mkdir(parents=True)
    try:
        iov = io.make_iovec(memory, str(shared.mount), block_size=4096)
        (link,) = iovs.iterdir()
        assert link.name.endswith(".b4096")
        assert iov.link == str(link)
        assert os.readlink(link) == f"/dev/shm/{memory.name}"
        assert io.extract_mount_point(str(iovs)) == str(shared.mount)
        del iov
        assert not list(iovs.iterdir())
    finally:
        iovs.rmdir()
        iovs.parent.rmdir()


def test_a_buffer_that_another_process_opens_by_its_id(
    io: Any, mp: str, memory: SharedMemory
) -> None:
    iov = io.make_iovec(memory, mp)
    described = importlib.import_module("hf3fs_py_usrbio._library")
    opened_iov = described.Iov()
    raw = bytes.fromhex(Path(iov.link).name.replace("-", ""))
    described.lib.hf3fs_iovopen.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t,
        ctypes.c_int,
    ]  # fmt: skip
    at = ctypes.addressof(opened_iov)
    assert described.lib.hf3fs_iovopen(at, raw, mp.encode(), memory.size, 0, -1) == 0
    assert memory.buf is not None
    memory.buf[:5] = b"hello"
    assert ctypes.string_at(opened_iov.base, 5) == b"hello"
    described.lib.hf3fs_iovdestroy(ctypes.c_void_p(at))
    assert os.path.islink(iov.link), "the link is the owner's"


def test_errors_are_results(io: Any, place: Path, mp: str, memory: SharedMemory) -> None:
    iov, ring = io.make_iovec(memory, mp), io.make_ioring(mp, 4)
    fd = os.open(place, os.O_RDONLY)
    try:
        io.register_fd(fd)
        (done,) = ring.prepare(iov[:8], True, fd, 0).submit().wait(min_results=1)
        assert done.result == -errno.EISDIR
    finally:
        io.deregister_fd(fd)
        os.close(fd)


def test_the_library_is_the_one_of_the_wheel() -> None:
    described = importlib.import_module("hf3fs_py_usrbio._library")
    assert library() == described.PATH


def test_the_cluster_is_clean_afterwards(shared: LocalCluster) -> None:
    os.sync()
    assert "3fs-virt" not in os.listdir(shared.mount)
    shared.fsck()
