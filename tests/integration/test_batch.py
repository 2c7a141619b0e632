"""Many small files through the library on a real cluster, read back through the mount."""

import os
import threading
import time
from pathlib import Path

from emberfs.client.blocking import Client
from emberfs.proto.ids import KiB
from emberfs.proto.meta_calls import Caller
from integration.harness import LocalCluster

COUNT = 700


def content(number: int) -> bytes:
    """Each file has its own, also of sizes that do not fit beside an inode."""
    size = (0, 1, 100, 4 * KiB, 8 * KiB, 20 * KiB)[number % 6]
    return (b"%d." % number * (size // 2 + 1))[:size]


def read_all(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in os.listdir(directory)}


def test_a_batch_of_files_is_read_back_through_the_mount(shared: LocalCluster) -> None:
    mount, plan = shared.mount, shared.plan
    (mount / "batch").mkdir()
    assert os.listdir(mount / "batch") == []  # and the kernel knows so
    (mount / "batch/7").write_bytes(b"it was here before")
    (mount / "closed").mkdir(mode=0o700)
    items = [(f"/batch/{number}", content(number)) for number in range(COUNT)]
    with Client(plan.mgmtd_address, cluster=plan.cluster) as client:
        assert client.batch_create(items) == [None] * COUNT
        assert read_all(mount / "batch") == {str(n): content(n) for n in range(COUNT)}
        paths = [path for path, _ in items]
        found = client.batch_stat([*paths, "/batch/none"])
        assert found.pop() is None
        for (path, data), one in zip(items, found, strict=True):
            assert isinstance(one, os.stat_result)
            real = os.stat(f"{mount}{path}")
            assert (one.st_size, one.st_ino, one.st_mode) == (len(data), real.st_ino, real.st_mode)
        refused = client.batch_create([(paths[0], b""), ("/batch/new", b"n")], exclusive=True)
        assert isinstance(refused[0], FileExistsError)
        assert refused[1] is None
    user = Caller(12345, 12345)
    with Client(plan.mgmtd_address, cluster=plan.cluster, caller=user) as client:
        denied = client.batch_create([("/closed/a", b""), ("/batch/b", b"")])
        assert all(isinstance(one, PermissionError) for one in denied)
        assert isinstance(client.batch_stat(["/closed/a"])[0], PermissionError)
    assert os.listdir(mount / "closed") == []
    shared.fsck()


def test_c9_meta_is_killed_while_batches_are_made(fresh: LocalCluster) -> None:
    """Every batch that was answered is there, once and whole; the caller sees no error."""
    plan, mount = fresh.plan, fresh.mount
    (mount / "d").mkdir()
    made = 0

    def kill() -> None:
        for _ in range(2):
            time.sleep(0.7)
            fresh.kill("meta")
            fresh.start("meta")

    killer = threading.Thread(target=kill)
    with Client(plan.mgmtd_address, cluster=plan.cluster) as client:
        killer.start()
        while killer.is_alive() or made == 0:
            items = [(f"/d/{made + n}", b"%d" % (made + n)) for n in range(300)]
            assert client.batch_create(items, exclusive=True) == [None] * 300
            made += 300
        killer.join()
        assert None not in client.batch_stat([f"/d/{n}" for n in range(made)])
    assert read_all(mount / "d") == {str(n): b"%d" % n for n in range(made)}
    fresh.fsck()
