"""One metadata load on every engine, with its servers killed under it: nothing lost or doubled."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from emberfs.kv.transactions import Engine
from emberfs.kv.url import open_engine
from emberfs.runtime.real import RealEnv
from kv_faulty import faulty_engine
from kv_servers import Etcd, Postgres
from meta_load import Load, Server

WORKERS = 8
STEPS = 60


async def opened(url: str) -> Engine:
    return await open_engine(RealEnv(), url, timeout_ns=20 * 10**9)


async def loaded(
    name: str,
    open_: Callable[[], Awaitable[Engine]],
    nemesis: Callable[[], None] | None = None,
    reopen: bool = True,
) -> None:
    engine = await open_()
    server = Server(engine)
    await server.start()
    load = Load(server, WORKERS, STEPS)

    async def strike() -> None:
        await load.half.wait()
        if nemesis is not None:
            await asyncio.to_thread(nemesis)

    async with asyncio.timeout(150):
        await asyncio.gather(load.run(), strike())
        await load.check(server)
        print(
            f"\n{name}: {load.calls / load.seconds:.0f} calls/s, {load.calls} calls, "
            f"{engine.conflicts} conflicts, {server.retried} sent again, "
            f"slowest {server.slowest_s:.1f} s"
        )
        await server.context.close()
        await engine.sync()
        if reopen:
            await engine.close()
            engine = await open_()
            await load.check(Server(engine))
        await engine.close()


def test_rocks(tmp_path: Path) -> None:
    asyncio.run(loaded("rocks", lambda: opened(f"rocks://{tmp_path}/kv")))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_server_that_fails_on_purpose(seed: int) -> None:
    async def faulty() -> Engine:
        return faulty_engine(0.05, seed)

    asyncio.run(loaded("faulty", faulty, reopen=False))


def test_r9_etcd_whose_leader_is_killed() -> None:
    """The leader of etcd dies under a metadata load: no error, nothing lost or doubled."""
    cluster = Etcd(3)
    try:
        asyncio.run(
            loaded(
                "etcd",
                lambda: opened(f"etcd://{cluster.hosts}/load"),
                lambda: cluster.kill(cluster.await_leader()),
            )
        )
    finally:
        cluster.stop()


def test_r9_postgres_that_crashes_and_comes_back() -> None:
    """PostgreSQL crashes under a metadata load and returns: nothing is lost or doubled."""
    server = Postgres()

    def crash() -> None:
        server.kill()
        server.start()

    try:
        asyncio.run(loaded("postgres", lambda: opened(server.url), crash))
    finally:
        server.stop()
