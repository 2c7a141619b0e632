"""The KV cache on a real cluster: several processes, killed writers, damaged files, its bounds."""

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from prometheus_client import REGISTRY

from emberfs.client.file import connect
from emberfs.client.kvcache import ownlog
from emberfs.client.kvcache.blocking import BlockingKVCache
from emberfs.client.kvcache.cache import KVCache
from emberfs.client.kvcache.records import FileId, decode
from emberfs.client.kvcache.slots import parse_log
from emberfs.proto.ids import MS, SECOND, MiB
from emberfs.runtime.real import RealEnv
from integration.harness import LocalCluster, wait_until
from integration.kvcache_peer import (
    BLOCK_BYTES,
    PATIENT_NS,
    Peer,
    block_of,
    key_of,
    peer,
    versions_read,
)

LONG = os.environ.get("EMBERFS_FAULTS") == "long"
CAP, SEGMENT, SNAPSHOT = 256 * MiB, 4 * MiB, 64 * MiB


@contextlib.contextmanager
def cache_of(cluster: LocalCluster, namespace: str, **settings: Any) -> Iterator[BlockingKVCache]:
    plan = cluster.plan
    settings = {"byte_cap": CAP, "segment_bytes": SEGMENT} | settings
    with BlockingKVCache(
        plan.mgmtd_address, "/kv", cluster=plan.cluster, namespace=namespace, **settings
    ) as cache:
        yield cache


def peer_of(
    cluster: LocalCluster, namespace: str, snapshot: int = SNAPSHOT
) -> contextlib.AbstractContextManager[Peer]:
    plan = cluster.plan
    return peer(plan.mgmtd_address, plan.cluster, namespace, CAP, SEGMENT, snapshot)


def names(first: int, stop: int) -> list[str]:
    return [f"block {n}" for n in range(first, stop)]


def keys(first: int, stop: int) -> list[bytes]:
    return [key_of(name) for name in names(first, stop)]


def store(cache: BlockingKVCache, which: list[bytes], version: int = 0) -> None:
    blocks = [block_of(key, version) for key in which]
    assert all(cache.put_many(which, blocks, deadline_ns=PATIENT_NS))


def misses(reason: str) -> float:
    return REGISTRY.get_sample_value("emberfs_kvcache_misses_total", {"reason": reason}) or 0.0


def test_what_one_process_puts_another_finds(shared: LocalCluster) -> None:
    """Within the promised 100 ms, and replaced and removed blocks as well, within a second."""
    with cache_of(shared, "share") as cache, peer_of(shared, "share") as other:
        store(cache, keys(0, 40))
        time.sleep(0.1)
        assert other.ask("get", keys=names(0, 42)) == [0] * 40 + [-1, -1]
        assert other.ask("put", keys=names(40, 60)) == [True] * 20
        time.sleep(0.1)
        assert versions_read(cache, keys(0, 60)) == [0] * 60
        assert cache.exists_many(keys(59, 61)) == [True, False]

        assert other.ask("put", keys=names(0, 5), version=1) == [True] * 5
        wait_until(lambda: versions_read(cache, keys(0, 6)) == [1] * 5 + [0], 3)
        assert cache.remove_many(keys(3, 8)) == [True] * 5
        assert cache.remove_many(keys(3, 8)) == [False] * 5
        assert versions_read(cache, keys(2, 9)) == [1] + [-1] * 5 + [0]
        wait_until(lambda: other.ask("get", keys=names(2, 9)) == [1] + [-1] * 5 + [0], 3)
        assert other.ask("count") == len(cache) == 55


def test_blocks_of_any_size_land_in_any_buffer(shared: LocalCluster) -> None:
    with cache_of(shared, "sizes") as cache:
        sizes = [1, 4095, 4096, 4097, BLOCK_BYTES, MiB, MiB + 1, 3 * MiB]
        some = [b"%d" % size for size in sizes]
        whole = {key: block_of(key, 0, size) for key, size in zip(some, sizes, strict=True)}
        assert all(cache.put_many(some, list(whole.values()), deadline_ns=PATIENT_NS))
        region = cache.allocate(4 * MiB)
        for key, size in zip(some, sizes, strict=True):
            sink = region.slice(4096, 3 * MiB)
            assert cache.get_many([key], [sink], deadline_ns=PATIENT_NS) == [size]
            assert sink.view[:size] == whole[key]
            assert cache.get_many([key], [bytearray(size - 1)]) == [0]  # too short a buffer
        region.close()
        with pytest.raises(ValueError, match="1 to"):
            cache.put_many([b"k"], [bytes(SEGMENT + 1)])
        with pytest.raises(ValueError, match="key"):
            cache.get_many([b"k" * 65], [bytearray(1)])
        with pytest.raises(ValueError, match="one for each"):
            cache.get_many([b"k"], [])
        with pytest.raises(ValueError, match="read-only"):
            cache.get_many([b"k"], [b"abc"])


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_tasks_share_one_cache_and_may_be_cancelled(shared: LocalCluster, transport: str) -> None:
    """A caller that goes away in the middle of a call leaves the cache as good as before."""

    async def story() -> None:
        plan, env = shared.plan, RealEnv()
        if transport == "tcp":
            env.host_key = "another-host"  # then no memory can be shared
        async with connect(plan.mgmtd_address, cluster=plan.cluster, env=env) as fs:
            opened = await KVCache.open(
                fs, "/kv", namespace=(transport, 3), byte_cap=CAP, segment_bytes=SEGMENT
            )
            async with opened as cache:
                await asyncio.gather(*(lane(cache, n) for n in range(4)))
            with pytest.raises(ValueError, match="closed"):
                await cache.get_many([b"k"], [bytearray(1)])

    async def lane(cache: KVCache, number: int) -> None:
        dice = random.Random(number)
        mine = [b"%d/%d" % (number, n) for n in range(30)]
        blocks = [block_of(key) for key in mine]
        buffers = [bytearray(BLOCK_BYTES) for _ in mine]
        for _ in range(12):
            do = dice.choice([cache.put_many, cache.get_many])
            task = asyncio.ensure_future(do(mine, blocks if do == cache.put_many else buffers))
            await asyncio.sleep(dice.uniform(0, 0.02))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert all(await cache.put_many(mine, blocks, deadline_ns=PATIENT_NS))
        lengths = await cache.get_many(mine, buffers, deadline_ns=PATIENT_NS)
        assert lengths == [BLOCK_BYTES] * 30
        assert buffers == blocks

    asyncio.run(story())


def test_a_restart_finds_everything(shared: LocalCluster) -> None:
    """From logs, from a snapshot with logs behind it, and a snapshot takes the place of logs."""
    with cache_of(shared, "restart") as cache:
        store(cache, keys(0, 64))
        assert all(cache.remove_many(keys(0, 4)))
    expected = [-1] * 4 + [0] * 60
    with cache_of(shared, "restart", snapshot_every_bytes=1) as cache:
        assert len(cache) == 60
        assert versions_read(cache, keys(0, 64)) == expected
        store(cache, keys(10, 12), version=2)  # more than one byte of records: a snapshot is due
        index = shared.mount / "kv" / "restart" / "index"
        wait_until(lambda: any(n.startswith("snapshot-") for n in os.listdir(index)), 10)
        wait_until(lambda: len([n for n in os.listdir(index) if n.startswith("log-")]) == 1, 10)
    expected[10:12] = [2, 2]
    for _ in range(2):
        with cache_of(shared, "restart") as cache:
            assert versions_read(cache, keys(0, 64)) == expected


@pytest.mark.parametrize(("bound", "value"), [("LOG_BYTES", 9000), ("LEAVE_NS", 0)])
def test_one_log_follows_another(
    shared: LocalCluster, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    """A log that is full, or that others may take for dead, is left for the next one."""
    monkeypatch.setattr(ownlog, bound, value)
    namespace = f"next {bound}"
    index = shared.mount / "kv" / quote(namespace) / "index"
    with peer_of(shared, namespace) as other, cache_of(shared, namespace) as cache:
        for first in range(0, 800, 20):
            store(cache, keys(first, first + 20))
            assert all(cache.remove_many(keys(first, first + 5)))
        assert len(os.listdir(index)) > 2
        expected = [-1 if n % 20 < 5 else 0 for n in range(800)]
        time.sleep(0.1)
        found = other.ask("get", keys=names(0, 800))
        assert [n for n in range(800) if found[n] < expected[n]] == []
        time.sleep(2.5)  # what was removed less than a second ago might still have been found
        assert other.ask("get", keys=names(0, 800)) == expected
        # Its logs of before are read by their own writer as well.
        assert versions_read(cache, keys(0, 800)) == expected
    with cache_of(shared, namespace, snapshot_every_bytes=1) as cache:
        assert versions_read(cache, keys(0, 800)) == expected
        store(cache, [b"one more"])
        wait_until(lambda: len(os.listdir(index)) <= 3, 10)
    with cache_of(shared, namespace) as cache:
        assert versions_read(cache, keys(0, 800)) == expected


def test_a_writer_killed_amid_puts_leaves_whole_blocks(shared: LocalCluster) -> None:
    """Whenever it dies: what it was told is stored is found, and all that is found is right."""
    dice = random.Random(4)
    for round_ in range(4):
        namespace, told = f"killed{round_}", []
        with peer_of(shared, namespace) as other:
            other.send("pour", name="b")
            told += other.receive()
            killer = threading.Timer(
                dice.uniform(0.05, 0.4), os.kill, (other.process.pid, signal.SIGKILL)
            )
            killer.start()
            with contextlib.suppress(AssertionError):
                while True:
                    told += other.receive()
            killer.join()
        assert other.process.returncode == -signal.SIGKILL
        with cache_of(shared, namespace) as cache:
            every = [key_of(f"b{n}") for n in range(len(told) + 16)]
            found = versions_read(cache, every)  # fails on wrong bytes
            assert found[: len(told)] == [0] * len(told)
            store(cache, [key_of("b3"), key_of("fresh")], version=1)
            assert versions_read(cache, [key_of("b3"), key_of("fresh")]) == [1, 1]


def stored_bytes(cluster: LocalCluster, namespace: str) -> int:
    directory = cluster.mount / "kv" / namespace / "segments"
    total = 0
    for entry in os.scandir(directory):
        with contextlib.suppress(FileNotFoundError):
            total += os.stat(entry).st_blocks * 512
    return total


def test_the_cap_is_kept_and_what_is_used_stays(shared: LocalCluster) -> None:
    """Two processes together; the least recently read segments go, their files with them."""
    cap = 24 * MiB
    with (
        cache_of(shared, "cap", byte_cap=cap) as cache,
        cache_of(shared, "cap", byte_cap=cap) as other,
    ):
        for first in range(0, 800, 40):
            store(cache if first % 80 else other, keys(first, first + 40))
            assert stored_bytes(shared, "cap") <= cap
        assert versions_read(cache, keys(0, 40)) == [-1] * 40
        assert versions_read(cache, keys(760, 800)) == [0] * 40
        for first in range(800, 1280, 120):  # more than fits, while another process reads some
            assert versions_read(other, keys(760, 800)) == [0] * 40, first
            time.sleep(2.2)  # others have heard of it then
            store(cache, keys(first, first + 120))
        assert versions_read(cache, keys(860, 920)) == [-1] * 60
        time.sleep(2.2)
        assert len(os.listdir(shared.mount / "kv" / "cap" / "segments")) <= cap // SEGMENT
        assert len(cache) == len(other)


def test_an_empty_segment_is_given_back(shared: LocalCluster) -> None:
    with cache_of(shared, "empty") as cache:
        store(cache, keys(0, 200))  # several segments
        segments = shared.mount / "kv" / "empty" / "segments"
        before = len(os.listdir(segments))
        assert before > 3
        assert all(cache.remove_many(keys(0, 200), deadline_ns=PATIENT_NS))
        wait_until(lambda: len(os.listdir(segments)) == 1, 10)  # the one that is being filled


def test_a_segment_that_is_gone_is_a_miss(shared: LocalCluster) -> None:
    with cache_of(shared, "gone") as cache:
        store(cache, keys(0, 8))
    for path in (shared.mount / "kv" / "gone" / "segments").iterdir():
        path.unlink()
    with cache_of(shared, "gone") as cache:
        before = misses("evicted")
        assert versions_read(cache, keys(0, 8)) == [-1] * 8
        assert misses("evicted") == before + 8
        store(cache, keys(0, 8), version=1)
        assert versions_read(cache, keys(0, 8)) == [1] * 8


def test_a_damaged_block_is_a_miss(shared: LocalCluster) -> None:
    """Bytes changed behind the cache's back, through the file system: it does not believe them."""
    with cache_of(shared, "damage") as cache:
        store(cache, keys(0, 20))
    (path,) = (shared.mount / "kv" / "damage" / "segments").iterdir()
    dice, hurt = random.Random(7), {3, 4, 11}
    with path.open("r+b", buffering=0) as file:
        for number in hurt:
            start = number * BLOCK_BYTES if number < 14 else 0
            place = start + dice.randrange(BLOCK_BYTES)
            byte = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte[0] ^ dice.randrange(1, 256)]), place)
    before = misses("checksum")
    with cache_of(shared, "damage") as cache:
        assert versions_read(cache, keys(0, 20)) == [-1 if n in hurt else 0 for n in range(20)]
        assert misses("checksum") == before + len(hurt)
    os.truncate(path, 6 * BLOCK_BYTES + 5)
    with cache_of(shared, "damage") as cache:
        assert versions_read(cache, keys(5, 8)) == [0, -1, -1]
        assert misses("truncated") >= 2


def test_a_damaged_log_costs_blocks_and_nothing_else(shared: LocalCluster) -> None:
    with cache_of(shared, "log") as cache:
        for first in range(0, 24, 4):
            store(cache, keys(first, first + 4))
    (path,) = (shared.mount / "kv" / "log" / "index").iterdir()
    name = parse_log(path.name)
    assert name is not None
    end = decode(name, 0, memoryview(path.read_bytes())).used
    assert end > 600
    assert decode(FileId(1, 1), 0, memoryview(path.read_bytes())).used == 0
    for place in sorted(random.Random(8).sample(range(end), 4), reverse=True):
        with path.open("r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 0x10]), place)
        with cache_of(shared, "log") as cache:
            found = versions_read(cache, keys(0, 24))
            assert found == sorted(found, reverse=True)  # those before the damage
            assert found[-1] == -1 or place > end - 100


def test_a_process_that_slept_through_a_snapshot_loads_anew(shared: LocalCluster) -> None:
    """Logs that it has not read are gone when it wakes up: it must know all the same."""
    with peer_of(shared, "sleep") as sleeper:
        with cache_of(shared, "sleep") as cache:
            store(cache, keys(0, 20))
            time.sleep(0.1)
            assert sleeper.ask("get", keys=names(0, 20)) == [0] * 20
        os.kill(sleeper.process.pid, signal.SIGSTOP)
        try:
            with cache_of(shared, "sleep") as cache:
                assert all(cache.remove_many(keys(0, 10)))
                store(cache, keys(20, 40))
            index = shared.mount / "kv" / "sleep" / "index"
            logs = {n for n in os.listdir(index) if n.startswith("log-")}
            with cache_of(shared, "sleep", snapshot_every_bytes=1) as cache:
                store(cache, keys(40, 41))
                wait_until(lambda: not logs & set(os.listdir(index)), 10)
        finally:
            os.kill(sleeper.process.pid, signal.SIGCONT)
        expected = [-1] * 10 + [0] * 31
        wait_until(lambda: sleeper.ask("get", keys=names(0, 41)) == expected, 5)
        assert sleeper.ask("put", keys=names(0, 1), version=3) == [True]
        time.sleep(0.1)
        with cache_of(shared, "sleep") as cache:
            assert versions_read(cache, keys(0, 41)) == [3] + [-1] * 9 + [0] * 31


@contextlib.contextmanager
def frozen(cluster: LocalCluster, *services: str) -> Iterator[None]:
    pids = [cluster.pid(name) for name in services]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_storage_that_hangs_costs_the_deadline_and_then_nothing(fresh: LocalCluster) -> None:
    """All storage is frozen: misses within the deadline, then at once; no late byte in a buffer."""
    storages = [n for n in fresh.plan.service_names() if n.startswith("storage")]
    with cache_of(fresh, "hang", deadline_ns=300 * MS) as cache:
        store(cache, keys(0, 32))
        region = cache.allocate(32 * BLOCK_BYTES)
        sinks = [region.slice(n * BLOCK_BYTES, BLOCK_BYTES) for n in range(32)]
        assert all(cache.get_many(keys(0, 32), sinks))
        pattern = b"\x5a" * region.size_bytes
        region.view[:] = pattern
        took: list[float] = []
        with frozen(fresh, *storages):
            for call in range(10):
                began = time.monotonic()
                if call % 2:
                    assert cache.put_many([b"new"], [bytes(100)]) == [False]
                else:
                    assert cache.get_many(keys(0, 32), sinks) == [0] * 32
                took.append(time.monotonic() - began)
            assert max(took) < 0.3 + 0.2
            assert min(took) < 0.05  # the breaker is open
            assert misses("breaker") > 0
            assert misses("timeout") > 0
        assert region.view == pattern
        wait_until(lambda: all(cache.get_many(keys(0, 32), sinks)), 60, pause_s=0.2)
        for n, key in enumerate(keys(0, 32)):
            assert sinks[n].view == block_of(key)
        wait_until(lambda: cache.put_many([b"new"], [bytes(100)]) == [True], 60, pause_s=0.2)
        region.close()


def test_a_dead_replica_is_not_noticed(fresh: LocalCluster) -> None:
    with cache_of(fresh, "dead", deadline_ns=20 * SECOND) as cache:
        store(cache, keys(0, 64))
        fresh.kill("storage1")
        assert versions_read(cache, keys(0, 64)) == [0] * 64
        store(cache, keys(64, 80))
        assert versions_read(cache, keys(0, 80)) == [0] * 80


def test_threads_share_one_cache(shared: LocalCluster) -> None:
    failures: list[BaseException] = []
    with cache_of(shared, "threads") as cache:

        def work(lane: int) -> None:
            try:
                mine = [key_of(f"{lane}/{n}") for n in range(24)]
                for _ in range(3):
                    store(cache, mine)
                    assert versions_read(cache, mine) == [0] * 24
                assert all(cache.remove_many(mine[:12], deadline_ns=PATIENT_NS))
                assert versions_read(cache, mine) == [-1] * 12 + [0] * 12
            except BaseException as problem:
                failures.append(problem)

        threads = [threading.Thread(target=work, args=(lane,)) for lane in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert len(cache) == 6 * 12


def test_settings_that_cannot_be_are_said(shared: LocalCluster, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="byte_cap"), cache_of(shared, "x", byte_cap=MiB):
        pass
    with pytest.raises(ValueError, match="namespace"), cache_of(shared, "x" * 300):
        pass


@pytest.mark.parametrize("seed", [1, 2, 3, 4] if LONG else [1])
def test_all_agree_after_kills_snapshots_and_evictions(shared: LocalCluster, seed: int) -> None:
    """Never wrong bytes on the way; when it is quiet, all and a newcomer find the same blocks."""
    dice, namespace = random.Random(seed), f"agree{seed}"
    cap = 20 * MiB
    with contextlib.ExitStack() as stack:

        def another() -> Peer:
            plan = shared.plan
            sizes = (cap, SEGMENT, 2000)  # a snapshot for every 2000 bytes of records
            return stack.enter_context(peer(plan.mgmtd_address, plan.cluster, namespace, *sizes))

        peers = [another() for _ in range(3)]
        for _ in range(120 if LONG else 45):
            place, first = dice.randrange(3), dice.randrange(160)
            some = names(first, first + dice.randrange(1, 30))
            kind = dice.choice(["put", "put", "put", "get", "get", "remove", "kill", "sleep"])
            if kind == "put":
                peers[place].ask("put", keys=some, version=dice.randrange(4))
            elif kind in ("get", "remove"):
                peers[place].ask(kind, keys=some)
            elif kind == "kill":
                peers[place].send("put", keys=some, version=dice.randrange(4))
                time.sleep(dice.uniform(0, 0.02))
                peers[place].process.kill()
                peers[place].process.wait()
                peers[place] = another()
            else:
                victim = peers[place].process.pid
                os.kill(victim, signal.SIGSTOP)
                for other in peers:
                    if other is not peers[place]:
                        other.ask("put", keys=some, version=dice.randrange(4))
                time.sleep(1.5)
                os.kill(victim, signal.SIGCONT)
        time.sleep(2.5)
        every = names(0, 190)
        found = [one.ask("get", keys=every) for one in peers]
        assert found[0] == found[1] == found[2]
        assert another().ask("get", keys=every) == found[0]
        assert found[0].count(-1) < 190
        index = os.listdir(shared.mount / "kv" / namespace / "index")
        assert any(name.startswith("snapshot-") for name in index)
        assert stored_bytes(shared, namespace) <= cap
