"""Every engine that this machine can run, for tests that must hold on all of them."""

import asyncio
import itertools
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import kv_fake_fdb
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.kv.url import open_engine
from emberfs.runtime.real import RealEnv
from kv_faulty import faulty_engine
from kv_servers import Etcd, Postgres

_NUMBERS = itertools.count(1)

KINDS = ("memory", "rocks", "etcd", "postgres", "fdb", "fdb stand-in", "faulty")
SHARED = ("etcd", "postgres", "fdb")


class Place(NamedTuple):
    """An empty store."""

    kind: str
    url: str

    @property
    def strict(self) -> bool:
        """Conflicts are exactly what was read; else only the outcome is that of some order."""
        return self.kind != "postgres"

    async def open(self) -> Engine:
        if self.kind == "faulty":
            return faulty_engine(0.1, next(_NUMBERS))
        return await open_engine(RealEnv(), self.url, timeout_ns=10 * 10**9)

    def live(self, work: Callable[[Engine], Awaitable[None]]) -> None:
        async def main() -> None:
            engine = await self.open()
            try:
                async with asyncio.timeout(60):
                    await work(engine)
                    await engine.sync()
            finally:
                await engine.close()

        asyncio.run(main())


@pytest.fixture(scope="session")
def etcd() -> Iterator[Etcd]:
    cluster = Etcd(3)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.stop()


def make_place(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Return an empty store of a kind; its server is started when it is first needed."""
    name = f"t{os.getpid()}_{next(_NUMBERS)}"
    match kind:
        case "rocks":
            return Place(kind, f"rocks://{tmp_path}/{name}")
        case "etcd":
            return Place(kind, f"etcd://{request.getfixturevalue('etcd').hosts}/{name}")
        case "postgres":
            return Place(kind, f"{request.getfixturevalue('postgres').url}?table={name}")
        case "fdb":
            file = os.environ.get("EMBERFS_TEST_FDB")
            if not file:
                pytest.skip(
                    "NOT TESTED: FoundationDB. Set EMBERFS_TEST_FDB=/path/to/fdb.cluster to run "
                    "the suite on a cluster of yours"
                )
            return Place(kind, f"fdb://{file}?{name}")
        case "fdb stand-in":
            monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
            monkeypatch.setitem(sys.modules, "fdb", kv_fake_fdb)
            return Place(kind, f"fdb:///{name}?x")
        case _:
            return Place(kind, "memory:")


async def put(engine: Engine, **values: bytes) -> None:
    async def work(txn: Transaction) -> None:
        for key, value in values.items():
            txn.set(key.encode(), value)

    await engine.run(work)


async def read_all(
    engine: Engine, start: bytes = b"\1", stop: bytes = b"\xff" * 8
) -> dict[bytes, bytes]:
    async def work(txn: Transaction) -> dict[bytes, bytes]:
        return dict(await txn.get_range(start, stop))

    return await engine.run(work, read_only=True)
