"""Many small files on a real cluster, read back through the mount; and on every shared store."""

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from emberfs.client.blocking import Client
from emberfs.kv.transactions import Engine
from emberfs.kv.url import open_engine
from emberfs.proto import batch_calls as bc
from emberfs.proto import meta_calls as mc
from emberfs.proto.ids import KiB
from emberfs.proto.meta_calls import Caller
from emberfs.runtime.real import RealEnv
from integration.harness import LocalCluster
from kv_faulty import faulty_engine
from kv_servers import Etcd, Postgres
from meta_load import WHO, Server

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


async def batches_on(engine: Engine) -> None:
    """Full messages at the same time in one directory, some sent twice, some of rivals."""
    server = Server(engine)
    server.context.policy = replace(server.context.policy, inline_bytes_max=100)
    await server.start()
    paths = [b"/%d" % n for n in range(3 * bc.ITEMS_MAX)]

    def request(client: int, first: int) -> bc.BatchCreateRequest:
        items = tuple(bc.BatchItem(path, path) for path in paths[first : first + bc.ITEMS_MAX])
        request = mc.RequestId(client, 1 + first)
        return bc.BatchCreateRequest(WHO, request, items, 0o644, exclusive=True)

    asked = [request(client, n * bc.ITEMS_MAX) for client in (1, 2) for n in range(3)]
    began = time.monotonic()
    answers = await asyncio.gather(
        *(server.twice(bc.BATCH_CREATE, one) for one in asked[:3]),
        *(server.call(bc.BATCH_CREATE, one) for one in asked[3:]),
    )
    took = time.monotonic() - began
    codes = [outcome.code for answer in answers for outcome in answer.outcomes]
    assert (codes.count(bc.DONE), len(codes)) == (len(paths), 2 * len(paths))
    began = time.monotonic()
    for first in range(0, len(paths), bc.ITEMS_MAX):
        looked = bc.BatchStatRequest(WHO, tuple(paths[first : first + bc.ITEMS_MAX]))
        answer = await server.call(bc.BATCH_STAT, looked)
        for path, row in zip(looked.paths, answer.rows, strict=True):
            assert (row.inode.length, row.inode.nlink) == (len(path), 1)
    stats = time.monotonic() - began
    print(f"{took:.2f} s, {stats:.2f} s, {engine.conflicts} conflicts, {server.retried} again")
    census = await server.call(mc.CENSUS, mc.CensusRequest())
    assert census.inodes == census.counter
    await server.context.close()
    await engine.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_batches_on_a_store_that_fails_on_purpose(seed: int) -> None:
    async def work() -> None:
        await batches_on(faulty_engine(0.05, seed))

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.parametrize("kind", ["etcd", "postgres"])
def test_batches_on_a_shared_store(kind: str) -> None:
    """One transaction of a full message is within what the store takes."""
    server = Etcd(1) if kind == "etcd" else Postgres()
    url = f"etcd://{server.hosts}/batch" if isinstance(server, Etcd) else server.url

    async def work() -> None:
        await batches_on(await open_engine(RealEnv(), url, timeout_ns=20 * 10**9))

    try:
        asyncio.run(asyncio.wait_for(work(), 90))
    finally:
        server.stop()
