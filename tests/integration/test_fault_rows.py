"""Rows of the fault list that need real processes and no kills: one cluster for all of them."""

import asyncio
import gc
import hashlib
import mmap
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path

import pytest

from emberfs.client.file import FileSystem, connect
from emberfs.proto.ids import KiB, MiB
from emberfs.runtime.real import RealEnv
from integration.harness import LocalCluster, run, wait_until
from unit.chunk_faults import World
from unit.test_storage_chunks import RealWorldEnv


def client(cluster: LocalCluster, *, tcp: bool = False) -> AbstractAsyncContextManager[FileSystem]:
    """Connect the library; over TCP as from another host."""
    env = RealEnv()
    if tcp:
        env.host_key = "another-host"
    return connect(cluster.plan.mgmtd_address, cluster=cluster.plan.cluster, env=env)


def test_o1_a_tail_elsewhere_sees_true_bytes_or_less(shared: LocalCluster) -> None:
    """One appends through the mount, another reads over TCP: true bytes or fewer, never zeros."""
    data = random.Random(1).randbytes(6 * MiB).replace(b"\0", b"\1")
    path = shared.mount / "growing"
    path.touch()

    def append() -> None:
        dice = random.Random(2)
        with path.open("ab") as file:
            at = 0
            while at < len(data):
                step = dice.choice((1, 300, 4096, 70_000))
                file.write(data[at : at + step])
                file.flush()
                if dice.random() < 0.1:
                    os.fsync(file.fileno())
                at += step

    async def follow() -> int:
        seen = grown = 0
        async with client(shared, tcp=True) as files:
            while seen < len(data):
                async with await files.open("/growing", "r") as file:
                    part = bytearray(MiB)
                    got = await file.pread(part, seen)
                    assert part[:got] == data[seen : seen + got], f"other bytes from {seen} on"
                    seen, grown = seen + got, grown + bool(got)
        return grown

    writer = threading.Thread(target=append)
    writer.start()
    try:
        assert asyncio.run(asyncio.wait_for(follow(), 40)) > 3
    finally:
        writer.join(40)
    assert path.read_bytes() == data


def test_o10_attributes_asked_for_in_a_storm_while_writing(shared: LocalCluster) -> None:
    """`ls -l` in a storm during writes: sizes only grow, and every byte is as written."""
    data = random.Random(3).randbytes(12 * MiB)
    place = shared.mount / "stormy"
    place.mkdir()
    path = place / "file"
    path.touch()
    done, problems, asked = threading.Event(), [], [0]

    def storm() -> None:
        last = 0
        while not done.is_set():
            listed = subprocess.run(["ls", "-l", place], capture_output=True, text=True, check=True)
            size = int(listed.stdout.splitlines()[-1].split()[4])
            if not last <= size <= len(data):
                problems.append((last, size))
            last = size
            asked[0] += 1

    stormers = [threading.Thread(target=storm) for _ in range(3)]
    for thread in stormers:
        thread.start()
    try:
        with path.open("wb") as file:
            for at in range(0, len(data), 50_000):
                file.write(data[at : at + 50_000])
                file.flush()
            os.fsync(file.fileno())
    finally:
        done.set()
        for thread in stormers:
            thread.join(20)
    assert asked[0] > 2  # each waits for what is buffered then
    assert not problems
    assert digest(path) == hashlib.sha256(data).hexdigest()


def digest(path: Path) -> str:
    """Digest of the whole content, from the servers: no page of the kernel's cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with os.fdopen(os.dup(fd), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    finally:
        os.close(fd)


def test_o17_what_many_writers_put_into_one_file_is_there_in_full(shared: LocalCluster) -> None:
    """Eight writers fill one file in pieces out of order: all content is compared, not its size."""
    data = random.Random(4).randbytes(16 * MiB)
    path = shared.mount / "whole"

    def write(number: int) -> None:
        pieces = list(range(number * 64 * KiB, len(data), 8 * 64 * KiB))
        random.Random(number).shuffle(pieces)
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        for at in pieces:
            os.pwrite(fd, data[at : at + 64 * KiB], at)
        os.close(fd)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join(30)
    assert digest(path) == hashlib.sha256(data).hexdigest()

    async def elsewhere() -> None:
        async with client(shared, tcp=True) as files, await files.open("/whole", "r") as file:
            assert await file.read() == data

    asyncio.run(elsewhere())


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 8192), (4096, 4096), (512, 512), (1, 4096), (100, 7), (4095, 8193)]
)
def test_o19_direct_io_aligned_or_not_is_exact(
    shared: LocalCluster, offset: int, length: int
) -> None:
    """O_DIRECT is accepted; reads and writes of any alignment move exactly the bytes asked for."""
    path = shared.mount / f"direct-{offset}-{length}"
    before = random.Random(5).randbytes(32 * KiB)
    path.write_bytes(before)
    memory = mmap.mmap(-1, 64 * KiB)  # aligned to a page
    piece = random.Random(6).randbytes(length)
    memory[:length] = piece
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        assert os.pwrite(fd, memoryview(memory)[:length], offset) == length
        memory[:length] = bytes(length)
        assert os.preadv(fd, [memoryview(memory)[:length]], offset) == length
        assert memory[:length] == piece
        assert os.preadv(fd, [memoryview(memory)[: 8 * KiB]], 28 * KiB) == 4 * KiB  # the end
    finally:
        os.close(fd)
    assert path.read_bytes() == before[:offset] + piece + before[offset + length :]


def test_o21_a_rename_is_seen_elsewhere_at_once(shared: LocalCluster) -> None:
    """A checkpoint that is written, synced and renamed is there, whole, for others at once."""

    async def story() -> None:
        async with client(shared) as here, client(shared, tcp=True) as there:
            await here.mkdir("/checkpoints")
            for turn in range(40):
                data = random.Random(turn).randbytes(1000 + turn * 5000)
                async with await here.open("/checkpoints/new", "w") as file:
                    await file.write(data)
                    await file.fsync()
                await here.rename("/checkpoints/new", "/checkpoints/last")
                assert await there.listdir("/checkpoints") == ["last"]
                async with await there.open("/checkpoints/last", "r") as file:
                    assert await file.read() == data
                with pytest.raises(FileNotFoundError):
                    await there.stat("/checkpoints/new")

    asyncio.run(story())
    last = random.Random(39).randbytes(1000 + 39 * 5000)
    assert (shared.mount / "checkpoints" / "last").read_bytes() == last


def usage(pid: int) -> tuple[int, int]:
    """Open descriptors and resident KiB of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    (resident,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return len(os.listdir(f"/proc/{pid}/fd")), int(resident)


def test_c6_o9_clients_that_come_and_go_leave_nothing_behind(shared: LocalCluster) -> None:
    """One-shot clients and thousands of opens: descriptors and memory of the servers stay flat."""
    (shared.mount / "small").write_bytes(b"x" * 5000)
    pids = {name: shared.pid(name) for name in [*shared.plan.service_names(), "fuse"]}

    async def come_and_go(clients: int, opens: int) -> None:
        for number in range(clients):
            async with client(shared, tcp=bool(number % 2)) as files:
                for _ in range(opens):
                    async with await files.open("/small", "r") as file:
                        assert len(await file.read()) == 5000
        for _ in range(clients * opens):
            assert len((shared.mount / "small").read_bytes()) == 5000

    def own() -> int:
        gc.collect()  # what only a cycle of garbage holds is no leak; when it goes is chance
        return len(os.listdir("/proc/self/fd"))

    asyncio.run(come_and_go(10, 20))
    before, mine = {name: usage(pid) for name, pid in pids.items()}, own()
    asyncio.run(come_and_go(60, 20))
    wait_until(lambda: own() <= mine + 2, 30)  # gRPC closes in threads of its own
    for name, pid in pids.items():
        descriptors, resident = usage(pid)
        assert descriptors <= before[name][0] + 12, f"{name}: {before[name]} {usage(pid)}"
        assert resident <= before[name][1] + 24 * KiB, f"{name}: {before[name]} {usage(pid)}"


@pytest.fixture
def disk_4kn(tmp_path: Path) -> Iterator[Path]:
    """A file system on a device whose sectors have 4096 bytes."""
    image, place = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(256 * MiB)
    place.mkdir()
    with ExitStack() as stack:
        made = run("losetup", "--find", "--show", "--sector-size", 4096, image, check=False)
        if made.returncode:
            pytest.skip(f"no loop devices of 4096 bytes here: {made.stderr.strip()}")
        device = made.stdout.strip()
        stack.callback(run, "losetup", "--detach", device, check=False)
        assert run("blockdev", "--getss", device).stdout.strip() == "4096"
        run("mkfs.ext4", "-q", device)
        run("mount", device, place)
        stack.callback(run, "umount", "-l", place, check=False)
        yield place


def test_s9_the_chunk_store_lives_on_sectors_of_4096_bytes(disk_4kn: Path) -> None:
    """On a disk with 4096-byte sectors a random life with restarts equals its model."""
    world = World(RealWorldEnv(disk_4kn / "t", 9))  # type: ignore[arg-type]
    for _ in range(3):
        world.run(60, flushes=0.05)
        world.compare()
        world.store.close()
        world.store = world.env.open()
        world.compare()
    world.store.close()
