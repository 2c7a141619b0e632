"""Programs that use 3FS's interface on the rings of the mount's daemon: buffers that it shares."""

import ctypes
import errno
import fcntl
import importlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest

from hf3fs_library import SOURCE, compile_program, installed, opened
from integration.harness import LocalCluster, run, wait_until
from integration.test_fio_ring import is_answering, ring_entries

PROGRAM = Path(__file__).with_name("hf3fs_program.c")
POSTED = Path(__file__).with_name("hf3fs_posted.c")
KiB, MiB = 1 << 10, 1 << 20
SIZE = 4 * MiB


@pytest.fixture
def place(shared: LocalCluster, request: pytest.FixtureRequest) -> Path:
    path = shared.mount / request.node.name.replace("[", "-").replace(" ", "-").strip("]")
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def io() -> Any:
    installed()
    return importlib.import_module("hf3fs_fuse.io")


@contextmanager
def buffer(mp: str, size: int = SIZE) -> Iterator[Any]:
    """A buffer of hf3fs_iovcreate, as Python's rings take it."""
    described = importlib.import_module("hf3fs_py_usrbio._library")
    native = importlib.import_module("hf3fs_py_usrbio").iovec
    create = described.lib.hf3fs_iovcreate
    create.argtypes = [ctypes.c_void_p, ctypes.c_char_p, *[ctypes.c_size_t] * 2, ctypes.c_int]
    iov = described.Iov()
    at = ctypes.c_void_p(ctypes.addressof(iov))
    assert create(at, mp.encode(), size, 0, -1) == 0
    made = native.__new__(native)
    made._become(iov, iov.base, size)
    try:
        yield made
    finally:
        described.lib.hf3fs_iovdestroy(at)


def bytes_of(part: Any) -> bytes:
    return bytes(memoryview(part))


def move(ring: Any, part: Any, read: bool, fd: int, offset: int) -> int:
    (done,) = ring.prepare(part, read, fd, offset).submit().wait(min_results=1)
    return int(done.result)


def notes() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("emberfs-iov-")}


def fds_of(cluster: LocalCluster) -> int:
    return len(os.listdir(f"/proc/{cluster.pid('fuse')}/fd"))


@pytest.mark.parametrize("way", ["rings", "mount"])
def test_which_way_a_c_program_goes(
    shared: LocalCluster, place: Path, tmp_path: Path, way: str
) -> None:
    """Unmodified programs take the rings; a setting has them go through the mount."""
    program = compile_program(PROGRAM, tmp_path / "program", "-std=gnu11", "-O2")
    setting = {"EMBERFS_HF3FS_RINGS": "0"} if way == "mount" else {}
    before = ring_entries(shared)
    done = subprocess.run(
        [program, place, shared.mount],
        env={**os.environ, **setting},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "all is as documented\n"), done.stderr
    # hf3fs_program.c, contents(), appending() and forking() in the parent: in memory of iovcreate.
    assert ring_entries(shared) - before == (0 if way == "mount" else 8 + 1 + 20 * 8)


def test_both_kinds_of_memory_in_one_ring(io: Any, shared: LocalCluster, place: Path) -> None:
    """Each I/O goes its way, all results come, and rings and mount see one file."""
    mp, content = str(shared.mount), random.Random(1).randbytes(SIZE)
    foreign = SharedMemory(create=True, size=SIZE)
    wrapped = io.make_iovec(foreign, mp)
    foreign.unlink()
    page = 16 * KiB
    with buffer(mp) as own, opened(io, place / "file") as fd:
        writing, reading = io.make_ioring(mp, 256, False), io.make_ioring(mp, 300, True)
        for part in (own, foreign.buf):
            memoryview(part)[:] = content
        before = ring_entries(shared)
        for at in range(0, SIZE, page):
            source = own if at // page % 2 else wrapped
            writing.prepare(source[at : at + page], False, fd, at, userdata=at)
        done = writing.submit().wait(min_results=SIZE // page)
        assert sorted(each.userdata for each in done) == list(range(0, SIZE, page))
        assert {each.result for each in done} == {page}
        assert ring_entries(shared) - before == SIZE // page // 2
        memoryview(own)[:] = bytes(SIZE)
        foreign.buf[:] = bytes(SIZE)
        for at in range(0, SIZE, page):
            target = wrapped if at // page % 2 else own
            reading.prepare(target[at : at + page], True, fd, at)
        results = [each.result for each in reading.submit().wait(min_results=SIZE // page)]
        assert results == [page] * (SIZE // page)
        mixed = bytearray(content)
        for at in range(page, SIZE, 2 * page):
            mixed[at : at + page] = bytes(page)
        assert bytes_of(own) == mixed
        assert Path(place / "file").read_bytes() == content
        del writing, reading
    del wrapped
    foreign.close()


def test_lengths_and_contents_are_the_mounts(io: Any, shared: LocalCluster, place: Path) -> None:
    """What a ring has written, the kernel tells at once, and the other way round."""
    mp = str(shared.mount)
    with buffer(mp) as own, opened(io, place / "file") as fd:
        reading, writing = io.make_ioring(mp, 4), io.make_ioring(mp, 4, False)
        before = ring_entries(shared)
        for end in (1000, 2000):
            assert move(writing, own[:1000], False, fd, end - 1000) == 1000
            assert os.fstat(fd).st_size == os.stat(place / "file").st_size == end
        assert os.pread(fd, 10, 1995) == bytes(5)
        os.pwrite(fd, b"abc", 100)
        assert move(reading, own[:3], True, fd, 100) == 3
        assert bytes_of(own[:3]) == b"abc"
        os.ftruncate(fd, 50)
        assert move(reading, own[:100], True, fd, 0) == 50
        assert ring_entries(shared) - before == 4


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("how", ["transfer", "benchmark"])
def test_sequences_of_c_programs_in_sanitizers(
    shared: LocalCluster, tmp_path: Path, how: str, sanitizer: str
) -> None:
    """Threads that wait, forked workers, rings that nobody destroys."""
    iovs = shared.mount / "3fs-virt" / "iovs"
    iovs.mkdir(parents=True)
    program, directory = tmp_path / "posted", shared.mount / f"{how}-{sanitizer}"
    directory.mkdir()
    include = SOURCE / "hf3fs_py_usrbio" / "include"
    sources = [path for path in (SOURCE / "native").glob("*.c") if path.name != "window.c"]
    flags = ["-std=gnu11", "-g", "-O1", f"-fsanitize={sanitizer}", "-pthread"]
    run("gcc", *flags, f"-I{include}", POSTED, *sources, "-o", program)
    before = ring_entries(shared)
    leaks = "detect_leaks=" + ("1" if how == "transfer" else "0")
    settings = {"TSAN_OPTIONS": "die_after_fork=0:halt_on_error=1", "ASAN_OPTIONS": leaks}
    try:
        done = subprocess.run(
            [program, how, directory, shared.mount],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (
            ring_entries(shared) - before == {"transfer": 16 * 8, "benchmark": 3 * 2 * 16 * 8}[how]
        )
    finally:
        iovs.rmdir()
        iovs.parent.rmdir()


def test_errors_and_files_that_rings_do_not_take(
    io: Any, shared: LocalCluster, place: Path
) -> None:
    """What the daemon refuses goes through the mount, and O_SYNC is the kernel's."""
    mp = str(shared.mount)
    (place / "file").write_bytes(b"x" * 5000)
    with buffer(mp) as own:
        reading, writing = io.make_ioring(mp, 4), io.make_ioring(mp, 4, False)
        before = ring_entries(shared)
        fd = os.open(place, os.O_RDONLY)
        io.register_fd(fd)
        assert move(reading, own[:8], True, fd, 0) == -errno.EISDIR
        io.deregister_fd(fd)
        os.close(fd)
        with opened(io, place / "file", os.O_RDWR | os.O_SYNC) as fd:
            assert move(writing, own[:8], False, fd, 0) == 8
        assert ring_entries(shared) == before
        with opened(io, place / "file") as fd:
            assert move(reading, own, True, fd, 1000) == 4000  # short, at the end
            os.unlink(place / "file")
            assert move(reading, own[:8], True, fd, 0) == 8
        assert ring_entries(shared) == before + 2


def test_several_threads_each_with_a_ring(io: Any, shared: LocalCluster, place: Path) -> None:
    """One connection, one buffer, one file, many rings and waiters."""
    mp, content = str(shared.mount), random.Random(2).randbytes(SIZE)
    (place / "file").write_bytes(content)
    wrong: list[object] = []

    def work(own: Any, fd: int, number: int) -> None:
        choose, ring = random.Random(number), io.make_ioring(mp, 8)
        mine = own[number * 64 * KiB : (number + 1) * 64 * KiB]
        for _ in range(40):
            offsets = [choose.randrange(SIZE - 8 * KiB) for _ in range(8)]
            for place_, offset in enumerate(offsets):
                part = mine[place_ * 8 * KiB : (place_ + 1) * 8 * KiB]
                ring.prepare(part, True, fd, offset, userdata=offset)
            for each in ring.submit().wait(min_results=8):
                offset = each.userdata
                if bytes_of(each) != content[offset : offset + 8 * KiB]:
                    wrong.append((number, offset, each.result))

    before = ring_entries(shared)
    with buffer(mp) as own, opened(io, place / "file") as fd:
        threads = [threading.Thread(target=work, args=(own, fd, number)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not wrong
    assert ring_entries(shared) - before == 6 * 40 * 8


def test_waiters_that_want_different_numbers(io: Any, shared: LocalCluster, place: Path) -> None:
    """Who is content with one result is not held up by who waits for more than will come."""
    mp = str(shared.mount)
    (place / "file").write_bytes(b"x" * 4096)
    with buffer(mp) as own, opened(io, place / "file") as fd:
        ring = io.make_ioring(mp, 8)
        found: dict[str, int] = {}

        def wait(name: str, least: int, timeout: float) -> None:
            found[name] = len(ring.wait(min_results=least, timeout=timeout))

        waiters = [
            threading.Thread(target=wait, args=("many", 8, 20.0)),
            threading.Thread(target=wait, args=("one", 1, 20.0)),
        ]
        for waiter in waiters:
            waiter.start()
        ring.prepare(own[:4096], True, fd, 0).submit()
        waiters[1].join(10)
        assert found == {"one": 1}
        for _ in range(8):
            ring.prepare(own[:4096], True, fd, 0)
        ring.submit()
        for waiter in waiters:
            waiter.join(15)
        assert sum(found.values()) == 9


def use_in_child(io: Any, mp: str, fd: int, own: Any, ring: Any) -> None:
    """The parent's buffer is memory as any other; a buffer of its own is shared with the daemon."""
    assert move(ring, own[:8], True, fd, 0) == 8
    with buffer(mp) as mine:
        assert move(ring, mine[:100], True, fd, 0) == 100
        assert bytes_of(mine[:100]) == b"x" * 100


def test_a_forked_child_has_rings_of_its_own(io: Any, shared: LocalCluster, place: Path) -> None:
    mp = str(shared.mount)
    (place / "file").write_bytes(b"x" * 100)
    before = ring_entries(shared)
    with buffer(mp) as own, opened(io, place / "file") as fd:
        ring = io.make_ioring(mp, 4)
        assert move(ring, own[:8], True, fd, 0) == 8
        ring.prepare(own[:100], True, fd, 0).submit()
        child = multiprocessing.get_context("fork").Process(
            target=use_in_child, args=(io, mp, fd, own, ring)
        )
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert ring.wait(min_results=1)[0].result == 100
        assert move(ring, own[:9], True, fd, 0) == 9
    assert ring_entries(shared) - before == 4


CHILD = """
import sys, time
sys.path[:0] = {path!r}
from integration import test_hf3fs_rings as tests
import importlib, os
io = importlib.import_module("hf3fs_fuse.io")
with tests.buffer({mp!r}) as own:
    ring = io.make_ioring({mp!r}, 64)
    fd = os.open({file!r}, os.O_RDWR)
    io.register_fd(fd)
    assert tests.move(ring, own[:8], True, fd, 0) == 8
    memoryview(own)[:5] = b"hello"
    print(own._root.id.hex() if len(own._root.id) == 16 else bytes(own._root)[16:32].hex())
    sys.stdout.flush()
    while True:
        for at in range(64):
            ring.prepare(own[at * 8192 + 8192:at * 8192 + 16384], True, fd, 0)
        ring.submit().wait(min_results=32)
        ring.wait(min_results=32)
"""


@contextmanager
def busy_child(mp: str, file: Path) -> Iterator["tuple[subprocess.Popen[str], bytes]"]:
    """A process that reads through a ring until it is killed, and its buffer's id."""
    tests = Path(__file__).parent.parent
    program = CHILD.format(path=[str(tests), str(installed())], mp=mp, file=str(file))
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield child, bytes.fromhex(child.stdout.readline())
    finally:
        child.kill()
        child.communicate()


def test_another_process_opens_the_buffer_by_its_id(
    io: Any, shared: LocalCluster, place: Path
) -> None:
    mp = str(shared.mount)
    (place / "file").write_bytes(b"y" * SIZE)
    described = importlib.import_module("hf3fs_py_usrbio._library")
    native = importlib.import_module("hf3fs_py_usrbio").iovec
    open_by_id = described.lib.hf3fs_iovopen
    open_by_id.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, *[ctypes.c_size_t] * 2, ctypes.c_int,
    ]  # fmt: skip
    iov = described.Iov()
    at = ctypes.c_void_p(ctypes.addressof(iov))
    with busy_child(mp, place / "file") as (child, ident), opened(io, place / "file") as fd:
        assert open_by_id(at, ident, mp.encode(), SIZE + 1, 0, -1) == -errno.EINVAL
        assert open_by_id(at, ident, mp.encode(), SIZE, 0, -1) == 0
        assert ctypes.string_at(iov.base, 5) == b"hello"
        theirs = native.__new__(native)
        theirs._become(iov, iov.base, SIZE)
        assert move(io.make_ioring(mp, 1), theirs[:4096], True, fd, 0) == 4096
        child.kill()
        child.wait()
        assert ctypes.string_at(iov.base, 5) == b"yyyyy"
        described.lib.hf3fs_iovdestroy(at)
        assert open_by_id(at, ident, mp.encode(), SIZE, 0, -1) == -errno.ENOENT
    with buffer(mp):
        pass


def test_notes_that_are_not_to_be_followed(io: Any, shared: LocalCluster) -> None:
    """A stranger's leads to whatever he likes; one that is old, to what has the number now."""
    described = importlib.import_module("hf3fs_py_usrbio._library")
    mp, ident = str(shared.mount), uuid.uuid4()
    note = Path(f"/dev/shm/emberfs-iov-{ident}.region")
    link = Path(f"/dev/shm/emberfs-hf3fs-{os.geteuid()}", str(ident))
    region = os.memfd_create("region", os.MFD_ALLOW_SEALING)
    plain = os.memfd_create("plain")
    for fd in (region, plain):
        os.ftruncate(fd, 4096)
    fcntl.fcntl(region, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)

    def opens(fd: int, inode: int, owner: int) -> int:
        note.write_text(f"emberfs region {os.getpid()} {fd} {inode}\n")
        os.chown(note, owner, owner)
        iov = described.Iov()
        at = ctypes.c_void_p(ctypes.addressof(iov))
        size = ctypes.c_size_t(4096)
        problem = described.lib.hf3fs_iovopen(
            at, ident.bytes, mp.encode(), size, ctypes.c_size_t(0), -1
        )
        described.lib.hf3fs_iovdestroy(at)
        return int(problem)

    try:
        with buffer(mp):  # makes the directory of links
            link.symlink_to(note)
        assert opens(region, os.fstat(region).st_ino, 0) == 0
        assert opens(region, os.fstat(region).st_ino, 65534) == -errno.EPERM
        assert opens(region, os.fstat(region).st_ino + 1, 0) == -errno.ENOENT
        assert opens(plain, os.fstat(plain).st_ino, 0) == -errno.ENOENT  # may become smaller
    finally:
        for path in (link, note):
            path.unlink(missing_ok=True)
        os.close(region)
        os.close(plain)


def test_a_killed_program_leaves_nothing(io: Any, shared: LocalCluster, place: Path) -> None:
    """In the middle of its I/O: neither in the daemon nor, after the next buffer, in /dev/shm."""
    mp = str(shared.mount)
    (place / "file").write_bytes(b"y" * SIZE)
    with busy_child(mp, place / "file"):  # warm
        pass
    path = [str(Path(__file__).parent.parent), str(installed())]
    sweep = f"import sys; sys.path[:0] = {path!r}\n"
    sweep += f"from integration import test_hf3fs_rings as t\nwith t.buffer({mp!r}): pass"
    subprocess.run([sys.executable, "-c", sweep], timeout=60, check=True)
    fds, names = fds_of(shared), notes()
    for _ in range(3):
        with busy_child(mp, place / "file") as (child, _):
            assert len(notes() - names) == 1
            child.kill()
            child.wait()
        wait_until(lambda: fds_of(shared) <= fds, 10)
        subprocess.run([sys.executable, "-c", sweep], timeout=60, check=True)
        assert notes() <= names


@pytest.mark.parametrize("manner", ["waits", "polls"])
def test_the_daemon_dies_and_comes_back(io: Any, fresh: LocalCluster, manner: str) -> None:
    """Errors, for who waits and for who only ever polls; a new buffer has rings again."""
    mp = str(fresh.mount)
    path = fresh.mount / "file"
    path.write_bytes(b"z" * MiB)
    with buffer(mp) as own:
        ring = io.make_ioring(mp, 8)
        fd = os.open(path, os.O_RDONLY)
        io.register_fd(fd)
        assert move(ring, own[:8], True, fd, 0) == 8
        os.kill(fresh.pid("fuse"), signal.SIGSTOP)
        for at in range(4):
            ring.prepare(own[at * 4096 : at * 4096 + 4096], True, fd, 0)
        ring.submit()
        assert ring.wait(min_results=4, timeout=0.1) == []
        fresh.kill("fuse")
        found: list[int] = []
        wait_until(lambda: len(collect(ring, found, manner)) == 4, 20)
        assert found == [-errno.ENOTCONN] * 4
        assert move(ring, own[:8], True, fd, 0) == -errno.ENOTCONN
        io.deregister_fd(fd)
        with suppress(OSError):  # of a dead mount: it fails, and closes
            os.close(fd)
        fresh.start("fuse")
        wait_until(lambda: offers_rings(fresh.mount), 20)  # which is later than that it answers
        with opened(io, path) as fd, buffer(mp) as new:
            before = ring_entries(fresh)
            assert move(ring, own[:8], True, fd, 0) == 8
            assert ring_entries(fresh) == before, "memory that the new daemon does not know"
            assert move(ring, new[:8], True, fd, 0) == 8
            assert ring_entries(fresh) == before + 1
            assert bytes_of(new[:8]) == b"z" * 8


def offers_rings(mount: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(os.readlink(mount / ".emberfs" / "ring"))
        except OSError:
            return False
        return True


def collect(ring: Any, found: list[int], manner: str) -> list[int]:
    timeout = 0.5 if manner == "waits" else -1.0
    found += [each.result for each in ring.wait(max_results=8, min_results=1, timeout=timeout)]
    return found


def test_a_mount_without_rings_and_one_that_refuses(fresh: LocalCluster, tmp_path: Path) -> None:
    """Silence where none are offered, and one line where they cannot be had."""
    program = compile_program(PROGRAM, tmp_path / "program", "-std=gnu11", "-O2")
    place = os.readlink(fresh.mount / ".emberfs" / "ring")
    os.unlink(place)
    Path(place).write_text("no socket")
    (fresh.mount / "refused").mkdir()
    command = [program, fresh.mount / "refused", fresh.mount]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert (done.returncode, done.stdout) == (0, "all is as documented\n"), done.stderr
    assert done.stderr.count("I/O goes through the mount") == done.stderr.count("\n") == 1
    os.unlink(place)
    fresh.kill("fuse")
    config = fresh.plan.process("fuse").config
    config.write_text(config.read_text() + 'rings = ""\n')
    fresh.start("fuse")
    wait_until(lambda: is_answering(fresh.mount), 20)
    (fresh.mount / "none").mkdir()
    command = [program, fresh.mount / "none", fresh.mount]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert (done.returncode, done.stdout) == (0, "all is as documented\n"), done.stderr
    assert not done.stderr


def test_the_cluster_is_clean_afterwards(shared: LocalCluster) -> None:
    os.sync()
    shared.fsck()
