"""Rings on a real mount: the daemon of the mount performs what real processes submit."""

import asyncio
import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from emberfs.client.native.aioring import AsyncRing
from emberfs.client.native.connection import Connection
from emberfs.client.native.ring import Ring
from integration.harness import LocalCluster, wait_until

MiB = 1 << 20
DATA = random.Random(9).randbytes(5 * MiB + 333)


@pytest.fixture
def daemon(shared: LocalCluster) -> Iterator[Connection]:
    with Connection(shared.mount) as connection:
        yield connection


@pytest.fixture
def path(shared: LocalCluster, request: pytest.FixtureRequest) -> Path:
    place = shared.mount / f"{request.node.name}.bin"
    place.write_bytes(DATA)
    return place


def test_the_virtual_directory_is_there_and_not_listed(shared: LocalCluster) -> None:
    place = shared.mount / ".emberfs"
    assert ".emberfs" not in os.listdir(shared.mount)
    assert os.listdir(place) == ["ring"]
    assert (place / "ring").is_symlink()
    assert (place / "ring").is_socket()
    assert place.stat().st_ino >> 60 == 0
    with pytest.raises(OSError):
        (place / "other").write_bytes(b"")
    with pytest.raises(FileExistsError):
        place.mkdir()


def test_reads_land_in_the_region_in_any_order(daemon: Connection, path: Path) -> None:
    dice = random.Random(1)
    places = [(dice.randrange(len(DATA) - 9000), dice.randrange(1, 9000)) for _ in range(500)]
    with path.open("rb") as opened, daemon.file(opened) as file, Ring(daemon, 64) as ring:
        region = daemon.region(500 * 9000)
        wanted = [(file, at, region.slice(9000 * i, n)) for i, (at, n) in enumerate(places)]
        assert ring.read_many(wanted, 20) == [n for _, n in places]
        for i, (at, n) in enumerate(places):
            assert region.view[9000 * i : 9000 * i + n] == DATA[at : at + n], i
        region.close()


def test_ends_holes_and_errors_are_told_one_by_one(
    shared: LocalCluster, daemon: Connection, path: Path
) -> None:
    sparse = shared.mount / "sparse.bin"
    with sparse.open("wb") as made:
        made.truncate(3 * MiB)
        made.seek(2 * MiB)
        made.write(b"end")
    region = daemon.region(MiB)
    with path.open("rb") as opened, sparse.open("rb") as holes, Ring(daemon) as ring:
        file, hollow = daemon.file(opened), daemon.file(holes)
        closed = daemon.file(opened)
        closed.close()
        region.view[:] = b"\xff" * MiB
        results = ring.read_many(
            [
                (file, len(DATA) - 10, region.slice(0, 100)),
                (file, len(DATA) + 10, region.slice(100, 100)),
                (hollow, 2 * MiB - 50, region.slice(200, 100)),
                (closed, 0, region.slice(300, 100)),
                (file, -1, region.slice(400, 100)),
                (file, 0, region.slice(500, 0)),
            ],
            20,
        )
        assert results[:3] == [10, 0, 100]
        assert [getattr(result, "errno", result) for result in results[3:]] == [
            errno.EBADF,
            errno.EINVAL,
            0,
        ]
        assert region.view[:10] == DATA[-10:]
        assert region.view[200:300] == bytes(50) + b"end" + bytes(47)
        (wrong,) = ring.write_many([(file, 0, region.slice(0, 10))], 20)
        assert isinstance(wrong, PermissionError)
    assert path.read_bytes() == DATA
    region.close()


def test_writes_are_seen_by_the_mount_at_once(daemon: Connection, path: Path) -> None:
    assert path.read_bytes() == DATA  # the kernel has its pages now
    with path.open("r+b") as opened, daemon.file(opened) as file, Ring(daemon) as ring:
        region = daemon.region(2 * MiB)
        region.view[:] = random.Random(2).randbytes(2 * MiB)
        wanted = [(file, i * 70_000, region.slice(i * 1000, 1000)) for i in range(60)]
        wanted.append((file, len(DATA), region.slice(0, MiB)))
        assert ring.write_many(wanted, 20) == [1000] * 60 + [MiB]
        expected = bytearray(DATA) + region.view[:MiB]
        for i in range(60):
            expected[i * 70_000 : i * 70_000 + 1000] = region.view[i * 1000 : i * 1000 + 1000]
        assert os.fstat(opened.fileno()).st_size == len(expected)
        assert path.read_bytes() == expected
        os.fsync(opened.fileno())
        region.close()


def test_what_the_mount_wrote_is_read_by_rings(daemon: Connection, path: Path) -> None:
    with path.open("r+b", buffering=0) as opened, daemon.file(opened) as file, Ring(daemon) as ring:
        region = daemon.region(4096)
        for i in range(50):
            opened.seek(i * 5000)
            opened.write(b"%05d" % i)
            assert ring.read_many([(file, i * 5000, region.slice(0, 5))], 20) == [5]
            assert region.view[:5] == b"%05d" % i
        region.close()


@pytest.mark.parametrize("size", [0, 1, 700, 8192])
def test_small_files_too(shared: LocalCluster, daemon: Connection, size: int) -> None:
    place = shared.mount / f"small-{size}"
    place.write_bytes(DATA[:size])
    with place.open("r+b") as opened, daemon.file(opened) as file, Ring(daemon) as ring:
        memory = bytearray(9000)
        assert ring.read_many([(file, 0, memory)], 20) == [size]
        assert memory[:size] == DATA[:size]
        assert ring.write_many([(file, size, b"more")], 20) == [4]
    assert place.read_bytes() == DATA[:size] + b"more"


def test_memory_of_any_kind(daemon: Connection, path: Path) -> None:
    """What lies in a region is filled in place, what does not is copied once."""
    region = daemon.region(8192)
    inside = memoryview(region.view)[100:1100]
    outside, shorts = bytearray(500), memoryview(bytearray(600)).cast("h")
    with path.open("rb") as opened, daemon.file(opened) as file, Ring(daemon) as ring:
        found = ring.read_many([(file, 7, inside), (file, 1, outside), (file, 2, shorts)], 20)
        assert found == [1000, 500, 600]
        assert region.view[100:1100] == DATA[7:1007]
        assert outside == DATA[1:501]
        assert shorts.tobytes() == DATA[2:602]
        with pytest.raises(TypeError, match="read-only"):
            ring.read_many([(file, 0, b"constant")])
    region.close()


def test_a_file_without_its_name(daemon: Connection, path: Path) -> None:
    with path.open("rb") as opened, daemon.file(opened) as file, Ring(daemon) as ring:
        path.unlink()
        memory = bytearray(1000)
        assert ring.read_many([(file, 5000, memory)], 20) == [1000]
        assert memory == DATA[5000:6000]


def test_descriptors_that_are_not_of_this_mount(
    shared: LocalCluster, daemon: Connection, tmp_path: Path
) -> None:
    (tmp_path / "local").write_bytes(b"x")
    for place in (tmp_path / "local", shared.mount):
        fd = os.open(place, os.O_RDONLY)
        try:
            with pytest.raises(OSError) as refused:
                daemon.file(fd)
            assert refused.value.errno == errno.EBADF
        finally:
            os.close(fd)
    with pytest.raises(OSError, match="not on an emberfs mount"):
        Connection(tmp_path)


def test_threads_share_a_ring(daemon: Connection, path: Path) -> None:
    region = daemon.region(8 * MiB)
    problems: list[BaseException] = []
    with path.open("rb") as opened, daemon.file(opened) as file, Ring(daemon, 32) as ring:

        def work(number: int) -> None:
            dice = random.Random(number)
            try:
                for _ in range(20):
                    at = dice.randrange(len(DATA) - 70_000)
                    parts = [
                        (file, at + 1000 * i, region.slice(MiB * number + 1000 * i, 1000))
                        for i in range(70)
                    ]
                    assert ring.read_many(parts, 30) == [1000] * 70
                    start = MiB * number
                    assert region.view[start : start + 70_000] == DATA[at : at + 70_000]
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not problems, problems[0]
    region.close()


def test_on_an_event_loop(daemon: Connection, path: Path) -> None:
    async def story() -> None:
        region = daemon.region(MiB)
        with path.open("rb") as opened, daemon.file(opened) as file:
            async with AsyncRing(Ring(daemon, 16)) as ring:

                async def one(i: int) -> None:
                    wanted = [
                        (file, 1000 * i + j, region.slice(1000 * i + j, 1)) for j in range(50)
                    ]
                    assert await ring.read_many(wanted) == [1] * 50

                await asyncio.wait_for(asyncio.gather(*map(one, range(40))), 30)
                for i in range(40):
                    assert region.view[1000 * i : 1000 * i + 50] == DATA[1000 * i : 1000 * i + 50]
                assert await ring.read_many([]) == []
        region.close()

    asyncio.run(story())


@pytest.mark.parametrize("priority", [0, 1, 2])
def test_depth_gathering_and_priority(daemon: Connection, path: Path, priority: int) -> None:
    region = daemon.region(MiB)
    with path.open("rb") as opened, daemon.file(opened) as file:
        with Ring(daemon, 64, priority=priority, depth=32, gather_us=20_000) as ring:
            for count in (1, 31, 32, 200):
                wanted = [(file, i * 100, region.slice(i * 100, 100)) for i in range(count)]
                assert ring.read_many(wanted, 20) == [100] * count
                assert region.view[: 100 * count] == DATA[: 100 * count]
        with pytest.raises(OSError, match="priority"):
            Ring(daemon, priority=9)
        with pytest.raises(OSError, match="power of two"):
            Ring(daemon, 100)
    region.close()


CLIENT = """
import os, sys
from emberfs.client.native.connection import Connection
from emberfs.client.native.ring import READ, Ring
daemon = Connection(sys.argv[1])
opened = open(sys.argv[1], "rb")
file, region, ring = daemon.file(opened), daemon.region(1 << 20), Ring(daemon)
print(os.fstat(region.fd).st_ino, flush=True)
while True:
    ring.read_many([(file, 4096 * i, region.slice(4096 * i, 4096)) for i in range(256)])
"""


def test_killed_processes_leave_nothing_behind(shared: LocalCluster, path: Path) -> None:
    served = [shared.pid(name) for name in ("fuse", *shared.plan.storage_names())]
    fuse = shared.pid("fuse")
    before = len(os.listdir(f"/proc/{fuse}/fd"))
    inodes: set[str] = set()
    for _ in range(4):
        running = [
            subprocess.Popen([sys.executable, "-c", CLIENT, path], stdout=subprocess.PIPE)
            for _ in range(3)
        ]
        try:
            for process in running:
                assert process.stdout is not None
                inodes.add(process.stdout.readline().decode().strip())
            assert inodes & mapped(served)
        finally:
            for process in running:
                process.send_signal(signal.SIGKILL)
                process.wait()
                process.stdout.close()
    assert len(inodes) == 12
    wait_until(lambda: not inodes & mapped(served), 20)
    wait_until(lambda: len(os.listdir(f"/proc/{fuse}/fd")) <= before + 2, 20)
    assert path.read_bytes() == DATA


def mapped(pids: list[int]) -> set[str]:
    """Inodes of the memfds that these processes have mapped."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {line.split()[4] for line in lines if "memfd:" in line}


def test_the_daemon_dies(fresh: LocalCluster) -> None:
    """What is under way fails at once, and so does what comes after; a new mount serves anew."""
    place = fresh.mount / "file"
    place.write_bytes(DATA)
    daemon = Connection(fresh.mount)
    opened = place.open("rb")
    file, region, ring = daemon.file(opened), daemon.region(MiB), Ring(daemon)
    assert ring.read_many([(file, 0, region.slice(0, MiB))], 20) == [MiB]
    os.kill(fresh.pid("fuse"), signal.SIGSTOP)
    batch = ring.submit(0, [(file, 0, region.slice(0, MiB))])
    with pytest.raises(TimeoutError):
        ring.wait(batch, 0.3)
    fresh.kill("fuse")
    (result,) = ring.wait(batch, 20)
    assert isinstance(result, OSError)
    assert result.errno == errno.ENOTCONN
    with pytest.raises(OSError, match="anew"):
        ring.read_many([(file, 0, region.slice(0, MiB))], 20)
    with pytest.raises(OSError, match="daemon is gone"):
        daemon.file(opened)
    ring.close()
    daemon.close()
    with pytest.raises(OSError):
        opened.read()
    with pytest.raises(OSError):
        opened.close()
    fresh.up()
    with Connection(fresh.mount) as again, place.open("rb") as reopened, Ring(again) as other:
        file = again.file(reopened)
        assert other.read_many([(file, 0, region.slice(0, MiB))], 20) == [MiB]
        assert region.view[:MiB] == DATA[:MiB]
    region.close()


def test_a_storage_process_dies_under_a_ring(fresh: LocalCluster) -> None:
    place = fresh.mount / "file"
    place.write_bytes(DATA)
    with Connection(fresh.mount) as daemon, place.open("r+b") as opened, Ring(daemon) as ring:
        file, region = daemon.file(opened), daemon.region(2 * MiB)
        for turn in range(30):
            if turn == 10:
                fresh.kill("storage1")
            parts = [(file, 8192 * i, region.slice(8192 * i, 8192)) for i in range(128)]
            assert ring.read_many(parts, 30) == [8192] * 128
            assert region.view[:MiB] == DATA[:MiB]
            assert ring.write_many([(file, 4 * MiB, region.slice(0, 4096))], 30) == [4096]
        region.close()


def test_a_storage_process_falls_silent_under_a_ring(fresh: LocalCluster) -> None:
    """It may still write to the region when it wakes: that is told, and a new one is served."""
    place = fresh.mount / "file"
    place.write_bytes(DATA)
    silent = fresh.pid("storage1")
    with Connection(fresh.mount) as daemon, place.open("rb") as opened, Ring(daemon) as ring:
        file, region = daemon.file(opened), daemon.region(MiB)
        parts = [(file, 40_000 * i, region.slice(8192 * i, 8192)) for i in range(128)]
        assert ring.read_many(parts, 30) == [8192] * 128  # of five chunks, from every replica
        os.kill(silent, signal.SIGSTOP)
        try:
            tainted = False
            for _ in range(20):
                for result in ring.read_many(parts, 60):
                    if isinstance(result, OSError):
                        assert result.errno == errno.EREMOTEIO
                        tainted = True
                if tainted:
                    break
            assert tainted
            other = daemon.region(MiB)
            parts = [(file, 40_000 * i, other.slice(8192 * i, 8192)) for i in range(128)]
            for _ in range(5):
                assert ring.read_many(parts, 60) == [8192] * 128
                for i in range(128):
                    found = other.view[8192 * i : 8192 * i + 8192]
                    assert found == DATA[40_000 * i : 40_000 * i + 8192]
        finally:
            os.kill(silent, signal.SIGCONT)
        memory = bytearray(100_000)
        assert ring.read_many([(file, 5, memory)], 60) == [100_000]
        assert memory == DATA[5:100_005]
        region.close()
        other.close()
