"""The call sequences of the programs that use 3FS's interface, on a real mount.

`make test-hf3fs-clients` runs some of those programs themselves; they need the network.
"""

import importlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest

from hf3fs_library import compile_program, installed
from integration.harness import LocalCluster, run, wait_until

KiB, MiB, TiB = 1 << 10, 1 << 20, 1 << 40
POSTED = Path(__file__).with_name("hf3fs_posted.c")


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


class PageClient:
    """Fixed pages of one huge sparse file, as SGLang keeps its cache of keys and values."""

    page_bytes, entries, file_bytes = 64 * KiB, 8, TiB

    def __init__(self, io: Any, path: Path) -> None:
        self.io = io
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.fd, self.file_bytes)
        io.register_fd(self.fd)
        mp = io.extract_mount_point(str(path))
        size = self.page_bytes * self.entries
        self.memory = [SharedMemory(size=size, create=True) for _ in range(2)]
        self.rings = [
            io.make_ioring(mp, self.entries, for_read=for_read, timeout=1, numa=-1)
            for for_read in (True, False)
        ]
        self.iovs = [io.make_iovec(memory, mp) for memory in self.memory]
        for memory in self.memory:
            memory.unlink()

    def move(self, read: bool, offsets: list[int]) -> list[int]:
        ring, iov = (self.rings[0], self.iovs[0]) if read else (self.rings[1], self.iovs[1])
        at = 0
        for offset in offsets:
            ring.prepare(iov[at : at + self.page_bytes], read, self.fd, offset)
            at += self.page_bytes
        done = ring.submit().wait(min_results=len(offsets), timeout=timedelta(seconds=60))
        return [each.result for each in done]

    def close(self) -> None:
        self.io.deregister_fd(self.fd)
        os.close(self.fd)
        del self.rings, self.iovs
        for memory in self.memory:
            memory.close()


def test_pages_of_a_sparse_terabyte(io: Any, place: Path) -> None:
    clients = [PageClient(io, place / "cache") for _ in range(4)]
    problems = []

    def use(number: int, client: PageClient) -> None:
        choose = random.Random(number)
        pages = client.file_bytes // client.page_bytes
        for _ in range(10):
            chosen = choose.sample(range(number, pages, 4), client.entries)
            offsets = [page * client.page_bytes for page in chosen]
            content = choose.randbytes(client.page_bytes * client.entries)
            client.memory[1].buf[:] = content
            results = client.move(False, offsets) + client.move(True, offsets)
            if results != [client.page_bytes] * 16 or client.memory[0].buf != content:
                problems.append((number, results))
        os.fsync(client.fd)

    threads = [threading.Thread(target=use, args=each) for each in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = clients[0].file_bytes - clients[0].page_bytes
    assert clients[0].move(True, [last]) == [clients[0].page_bytes]  # a hole at the end
    for client in clients:
        client.close()
    assert not problems
    assert (place / "cache").stat().st_size == TiB


class ChunkClient:
    """One file per chunk, a header of 28 bytes before its data, as LMCache writes them."""

    header_bytes, iov_bytes = 28, 256 * KiB

    def __init__(self, io: Any, mp: str) -> None:
        self.io = io
        name = f"3FSClient_{os.getpid()}_{threading.get_ident()}"
        self.memory = [
            SharedMemory(name=name + end, size=self.iov_bytes, create=True)
            for end in ("_rd", "_wt")
        ]
        self.iovs = [
            io.make_iovec(shm=memory, hf3fs_mount_point=mp, numa=-1) for memory in self.memory
        ]
        self.rings = [
            io.make_ioring(hf3fs_mount_point=mp, entries=128, for_read=read, timeout=200, numa=-1)
            for read in (True, False)
        ]

    def move(self, read: bool, fd: int, data: bytearray, start: int) -> None:
        ring, iov = (self.rings[0], self.iovs[0]) if read else (self.rings[1], self.iovs[1])
        memory = self.memory[0 if read else 1]
        for at in range(0, len(data), self.iov_bytes):
            count = min(self.iov_bytes, len(data) - at)
            if not read:
                memory.buf[:count] = data[at : at + count]
            ring.prepare(iov[:count], read, fd, start + at)
            assert ring.submit().wait(min_results=1)[0].result == count
            if read:
                data[at : at + count] = memory.buf[:count]

    def put(self, path: Path, header: bytearray, data: bytearray) -> None:
        temporary = path.with_suffix(".tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o777)
        self.io.register_fd(fd)
        self.move(False, fd, header, 0)
        self.move(False, fd, data, len(header))
        os.rename(temporary, path)  # while it is registered
        self.io.deregister_fd(fd)
        os.close(fd)

    def get(self, path: Path, size: int) -> tuple[bytearray, bytearray]:
        fd = os.open(path, os.O_RDONLY)
        self.io.register_fd(fd)
        header, data = bytearray(self.header_bytes), bytearray(size)
        self.move(True, fd, header, 0)
        self.move(True, fd, data, len(header))
        self.io.deregister_fd(fd)
        os.close(fd)
        return header, data

    def close(self) -> None:
        del self.rings, self.iovs
        for memory in self.memory:
            memory.close()
            memory.unlink()


def test_chunks_with_a_header(io: Any, place: Path, mp: str) -> None:
    assert io.extract_mount_point(mp) == mp
    problems = []

    def use(number: int) -> None:
        client = ChunkClient(io, mp)
        choose = random.Random(number)
        for round_ in range(6):
            path = place / f"chunk-{number}-{round_ % 3}"  # some are replaced
            header = bytearray(choose.randbytes(28))
            data = bytearray(choose.randbytes(choose.choice([1, 9999, 256 * KiB, 700_001])))
            client.put(path, header, data)
            if client.get(path, len(data)) != (header, data):
                problems.append((number, round_))
        client.close()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert sorted(os.listdir(place)) == [f"chunk-{n}-{i}" for n in range(4) for i in range(3)]


def test_a_file_in_windows_of_many_slices(io: Any, place: Path, mp: str) -> None:
    """A ring of 128 entries over one buffer, until a short read, as fastsafetensors reads."""
    content = random.Random(5).randbytes(3 * MiB + 4321)
    path = place / "model.safetensors"
    path.write_bytes(content)
    entries, buffer_bytes = 128, MiB
    slice_bytes = buffer_bytes // entries
    memory = SharedMemory(create=True, size=buffer_bytes)
    iov, ring = io.make_iovec(memory, mp), io.make_ioring(mp, entries, for_read=True)
    memory.unlink()
    fd = os.open(path, os.O_RDONLY)
    header = os.pread(fd, 8, 0) + os.pread(fd, 1000, 8)  # plain reads beside the ring
    io.register_fd(fd)
    got, offset = bytearray(header), len(header)
    while True:
        for index in range(entries):
            at = index * slice_bytes
            ring.prepare(iov[at : at + slice_bytes], True, fd, offset + at, userdata=index)
        done = ring.submit().wait(min_results=entries)
        assert sorted(each.userdata for each in done) == list(range(entries))
        counts = {each.userdata: each.result for each in done}
        for index in range(entries):
            at = index * slice_bytes
            got += memory.buf[at : at + counts[index]]
        offset += buffer_bytes
        if min(counts.values()) < slice_bytes:
            break
    assert got == content
    io.deregister_fd(fd)
    os.close(fd)
    del iov, ring
    memory.close()


def test_a_ring_refuses_what_its_reader_should_not_do(io: Any, place: Path, mp: str) -> None:
    """More than a ring holds is BlockingIOError; after a wait it goes on where it was."""
    (place / "file").write_bytes(b"x" * 100)
    memory = SharedMemory(create=True, size=4096)
    iov, ring = io.make_iovec(memory, mp), io.make_ioring(mp, 4)
    memory.unlink()
    fd = os.open(place / "file", os.O_RDONLY)
    io.register_fd(fd)
    seen = []
    for number in range(64):
        try:
            ring.prepare(iov[number : number + 1], True, fd, number, userdata=number)
        except BlockingIOError:
            seen += [each.userdata for each in ring.submit().wait(min_results=1)]
            ring.prepare(iov[number : number + 1], True, fd, number, userdata=number)
    seen += [each.userdata for each in ring.submit().wait(min_results=64 - len(seen))]
    assert sorted(seen) == list(range(64))
    assert bytes(memory.buf[:64]) == b"x" * 64
    io.deregister_fd(fd)
    os.close(fd)
    del iov, ring
    memory.close()


@pytest.mark.parametrize("how", ["transfer", "benchmark"])
def test_programs_in_c(shared: LocalCluster, tmp_path: Path, how: str) -> None:
    """Rings posted again and polled with times that are over; rings that nobody destroys."""
    iovs = shared.mount / "3fs-virt" / "iovs"
    iovs.mkdir(parents=True)
    try:
        program = compile_program(POSTED, tmp_path / "posted", "-std=gnu11", "-O2")
        (shared.mount / how).mkdir()
        run(program, how, shared.mount / how, shared.mount)
        assert not list(iovs.iterdir()), "no link is left"
    finally:
        for left in iovs.iterdir():
            left.unlink()
        iovs.rmdir()
        iovs.parent.rmdir()


def reads_during(
    io: Any, fd: int, mp: str, content: bytes, disturb: Callable[[], None]
) -> list[int]:
    """Results of one-page reads while `disturb` runs in another thread."""
    memory = SharedMemory(create=True, size=4096)
    iov, ring = io.make_iovec(memory, mp), io.make_ioring(mp, 1)
    memory.unlink()
    thread = threading.Thread(target=disturb)
    thread.start()
    results = []
    choose = random.Random(1)
    while thread.is_alive() or len(results) < 200:
        offset = choose.randrange(len(content) - 4096)
        (done,) = ring.prepare(iov, True, fd, offset).submit().wait(min_results=1)
        if done.result == 4096 and memory.buf != content[offset : offset + 4096]:
            results.append(-1)
        results.append(done.result)
    thread.join()
    del iov, ring
    memory.close()
    return results


def test_io_goes_on_when_a_storage_service_dies(io: Any, fresh: LocalCluster) -> None:
    content = random.Random(2).randbytes(8 * MiB)
    path = fresh.mount / "file"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)  # not from the kernel's cache
    io.register_fd(fd)
    victim = next(name for name in fresh.plan.service_names() if "storage" in name)
    results = reads_during(io, fd, str(fresh.mount), content, lambda: fresh.kill(victim))
    assert set(results) == {4096}
    io.deregister_fd(fd)
    os.close(fd)
    fresh.start(victim)
    wait_until(lambda: "serving" in fresh.status(), 30)


def test_closing_a_file_holds_no_ring_up(io: Any, fresh: LocalCluster) -> None:
    """Closing waits for the mount's daemon, which stands still here; other calls do not."""
    mp = str(fresh.mount)
    ring = io.make_ioring(mp, 4)
    fds = [os.open(fresh.mount / name, os.O_RDWR | os.O_CREAT) for name in ("one", "two")]
    for fd in fds:
        io.register_fd(fd)
        os.write(fd, b"x")
    daemon = fresh.pid("fuse")
    closing = threading.Thread(target=io.deregister_fd, args=(fds[0],))
    asked = threading.Thread(target=lambda: [ring.wait() for _ in range(100)])
    os.kill(daemon, signal.SIGSTOP)
    try:
        closing.start()
        closing.join(0.5)
        assert closing.is_alive(), "this mount closes without its daemon: the test shows nothing"
        asked.start()
        asked.join(10)
        assert not asked.is_alive()
    finally:
        os.kill(daemon, signal.SIGCONT)
        closing.join(60)
        asked.join(60)
        io.deregister_fd(fds[1])
        for fd in fds:
            os.close(fd)


def test_what_is_ready_does_not_wait_for_what_hangs(io: Any, fresh: LocalCluster) -> None:
    """A result is handed out while others wait; destroying waits for those that have begun."""
    mp = str(fresh.mount)
    memory = SharedMemory(create=True, size=21 * 4096)
    iov, ring = io.make_iovec(memory, mp), io.make_ioring(mp, 21)
    memory.unlink()
    fds = []
    for name in ("hot", "cold"):
        (fresh.mount / name).write_bytes(name.encode() * 5000)
        fds.append(os.open(fresh.mount / name, os.O_RDONLY))
        os.pread(fds[-1], 20_000, 0)
        io.register_fd(fds[-1])
    os.posix_fadvise(fds[1], 0, 0, os.POSIX_FADV_DONTNEED)
    daemon = fresh.pid("fuse")
    destroying = threading.Thread(target=ring.ior.destroy)
    described = importlib.import_module("hf3fs_py_usrbio._library")
    cqes = (described.Cqe * 1)()
    waiting = threading.Thread(
        target=described.lib.hf3fs_wait_for_ios, args=(ring.ior._at, cqes, 1, 1, None)
    )
    os.kill(daemon, signal.SIGSTOP)
    try:
        ring.prepare(iov[4096:8192], True, fds[1], 0, userdata="cold").submit()
        waiting.start()  # for ever, and before there is anything
        time.sleep(0.2)
        ring.prepare(iov[:4096], True, fds[0], 0, userdata="hot").submit()
        waiting.join(20)
        assert cqes[0].result == 4096
        assert bytes(memory.buf[:4096]) == b"hot" * 1365 + b"h"
        for page in range(2, 21):
            at = page * 4096
            ring.prepare(iov[at : at + 4096], True, fds[1], 0, userdata="cold")
        assert ring.submit().wait(min_results=1, timeout=0.2) == []
        destroying.start()
        destroying.join(0.5)
        assert destroying.is_alive(), "what is under way may still write to the buffer"
    finally:
        os.kill(daemon, signal.SIGCONT)
        if destroying.ident is not None:
            destroying.join(60)
    assert not destroying.is_alive()
    written = bytes(memory.buf[4096:]).count(b"cold" * 1024)
    assert written > 0, "it ended after the ring did"
    assert written <= 8, "what no thread had begun never begins"
    for fd in fds:
        io.deregister_fd(fd)
        os.close(fd)
    del iov, ring
    memory.close()


def test_the_cluster_is_clean_afterwards(shared: LocalCluster) -> None:
    os.sync()
    shared.fsck()
