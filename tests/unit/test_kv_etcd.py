"""What is special about etcd: tombstones, the fence, limits, members that die."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from emberfs.kv.etcd import EtcdBackend
from emberfs.kv.etcd_link import EtcdLink
from emberfs.kv.remote import RemoteEngine
from emberfs.kv.transaction import Transaction, pack_counter, unpack_counter
from emberfs.kv.url import open_engine
from emberfs.proto import etcd_pb2 as pb
from emberfs.proto.errors import Code, EmberfsError
from emberfs.runtime.real import RealEnv
from kv_servers import PROPER, Etcd
from unit.kv_engines import make_place, put, read_all


def live(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    work: Callable[[RemoteEngine, EtcdBackend], Awaitable[None]],
) -> None:
    async def body(engine: object) -> None:
        assert isinstance(engine, RemoteEngine)
        assert isinstance(engine.backend, EtcdBackend)
        await work(engine, engine.backend)

    make_place("etcd", request, tmp_path).live(body)


async def rows_of(backend: EtcdBackend) -> dict[bytes, bytes]:
    """Return everything behind the prefix, as etcd has it."""
    prefix = backend.keys[:-1]
    found = await backend.link.range(pb.RangeRequest(key=prefix, range_end=prefix + b"\xff"))
    return {row.key[len(prefix) :]: row.value for row in found.kvs}


async def remove_all(engine: RemoteEngine, *keys: bytes) -> None:
    async def work(txn: Transaction) -> None:
        for key in keys:
            txn.clear(key)

    await engine.run(work)


async def revision(backend: EtcdBackend) -> int:
    return (await backend.link.range(pb.RangeRequest(key=b"x"))).header.revision


def test_tombstones_go_once_nobody_can_be_older(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    async def work(engine: RemoteEngine, backend: EtcdBackend) -> None:
        await put(engine, a=b"1", b=b"1", c=b"1")
        await remove_all(engine, b"a", b"b", *(b"many%05d" % i for i in range(1100)))
        rows = await rows_of(backend)
        assert rows[b"ka"] == rows[b"kb"] == b"\0"
        await put(engine, b=b"again")  # not a tombstone any more
        fresh = engine.begin()
        old = engine.begin()
        await old.get(b"c")
        now = await revision(backend)
        await put(engine, other=b"1")
        assert await fresh.get(b"a") is None  # its moment is later than the fence will be
        assert await backend.graves.remove(now + 1) == 1102
        rows = await rows_of(backend)
        assert {key for key in rows if key[:1] in (b"k", b"g")} >= {b"kb", b"kc", b"kother"}
        assert not [key for key in rows if key == b"ka" or key.startswith((b"kmany", b"g"))]
        old.set(b"out", b"1")
        with pytest.raises(EmberfsError) as raised:
            await old.commit()
        assert raised.value.code == Code.TOO_OLD
        fresh.set(b"a", b"new")
        await fresh.commit()
        assert (await read_all(engine))[b"b"] == b"again"
        assert await backend.graves.remove(now) == 0  # the fence only rises

    live(request, tmp_path, work)


def test_the_fence_follows_at_a_distance(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emberfs.kv.graves.AGE_NS", 50_000_000)

    async def work(engine: RemoteEngine, backend: EtcdBackend) -> None:
        await put(engine, a=b"1")
        await remove_all(engine, b"a")
        assert await backend.graves.tick() == 0
        await asyncio.sleep(0.06)
        assert await backend.graves.tick() == 1
        assert b"ka" not in await rows_of(backend)

    live(request, tmp_path, work)


def test_what_was_read_before_a_compaction_is_too_old(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: RemoteEngine, backend: EtcdBackend) -> None:
        txn = engine.begin(read_only=True)
        await txn.get(b"a")

        async def refuses(self: EtcdLink, request: pb.RangeRequest) -> pb.RangeResponse:
            from emberfs.kv import etcd_link

            class Refusal:
                def details(self) -> str:
                    return "etcdserver: mvcc: required revision has been compacted"

            found = etcd_link.explain(Refusal())  # type: ignore[arg-type]
            assert found is not None
            raise found

        monkeypatch.setattr(EtcdLink, "range", refuses)
        with pytest.raises(EmberfsError) as raised:
            await txn.get(b"b")
        assert raised.value.code == Code.TOO_OLD
        monkeypatch.undo()
        txn.cancel()

    live(request, tmp_path, work)


def test_too_many_rows_say_so(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    async def work(engine: RemoteEngine, backend: EtcdBackend) -> None:
        async def many(txn: Transaction) -> None:
            for i in range(4001):
                txn.set(b"%d" % i, b"")

        with pytest.raises(EmberfsError, match=r"4002 rows.*split it") as raised:
            await engine.run(many)
        assert raised.value.code == Code.TRANSACTION_TOO_LARGE

    live(request, tmp_path, work)


async def refusal_of(url: str) -> EmberfsError:
    with pytest.raises(EmberfsError) as raised:
        await open_engine(RealEnv(), url)
    return raised.value


def test_an_etcd_with_default_limits_is_refused_with_the_flags_to_set() -> None:
    cluster = Etcd(1, "--unsafe-no-fsync")
    try:
        problem = asyncio.run(refusal_of(f"etcd://{cluster.hosts}/x"))
        assert problem.code == Code.CONFIG
        assert "--max-txn-ops 4096" in problem.message
    finally:
        cluster.stop()


def test_members_of_two_clusters_are_refused_and_nobody_at_all_is_named(etcd: Etcd) -> None:
    other = Etcd(1, *PROPER, "--unsafe-no-fsync")
    try:
        problem = asyncio.run(refusal_of(f"etcd://{etcd.hosts},{other.hosts}/x"))
        assert problem.code == Code.CONFIG
        assert "different etcd clusters" in problem.message
    finally:
        other.stop()
    problem = asyncio.run(refusal_of(f"etcd://{other.hosts}/x"))
    assert problem.code == Code.UNREACHABLE
    assert "do not answer" in problem.message


def test_a_full_etcd_is_no_space() -> None:
    cluster = Etcd(1, *PROPER, "--unsafe-no-fsync", f"--quota-backend-bytes={4 << 20}")

    async def fill() -> EmberfsError:
        engine = await open_engine(RealEnv(), f"etcd://{cluster.hosts}/x", timeout_ns=10**10)

        async def many() -> None:
            for i in range(400):  # etcd judges by the size after its last batch
                await put(engine, **{f"k{i % 100}": bytes(300_000)})

        with pytest.raises(EmberfsError) as raised:
            await many()
        await read_all(engine)  # reads still work
        await engine.close()
        return raised.value

    try:
        problem = asyncio.run(fill())
        assert problem.code == Code.NO_SPACE
        assert "quota-backend-bytes" in problem.message
    finally:
        cluster.stop()


def test_r9_the_leader_is_killed_under_load_and_nothing_is_lost_or_doubled() -> None:
    """The leader of etcd dies under transactions: each of them happens exactly once."""
    cluster = Etcd(3)

    async def load() -> None:
        engine = await open_engine(RealEnv(), f"etcd://{cluster.hosts}/x", timeout_ns=10**10)
        done, some, most = 0, asyncio.Event(), asyncio.Event()

        async def count(txn: Transaction) -> None:
            txn.set(b"n", pack_counter(unpack_counter(await txn.get(b"n")) + 1))
            txn.add(b"Cn", 1)

        async def many() -> None:
            nonlocal done
            for _ in range(60):
                await engine.run(count)
                done += 1
                if done == 60:
                    some.set()
                if done == 180:
                    most.set()

        async def nemesis() -> None:
            await some.wait()
            leader = await asyncio.to_thread(cluster.await_leader)
            cluster.kill(leader)
            await most.wait()
            cluster.start(leader)

        async with asyncio.timeout(60):
            await asyncio.gather(nemesis(), *(many() for _ in range(4)))
        expected = pack_counter(240)
        assert await read_all(engine) == {b"n": expected, b"Cn": expected}
        await engine.close()

    try:
        asyncio.run(load())
    finally:
        cluster.stop()
