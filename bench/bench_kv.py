"""Stores of metadata: transactions shaped like a create, against the bare server under them.

Limit: what each server does in the same run without our transactions: RocksDB reads and one batch;
etcd reads and one put through the same stub; PostgreSQL reads and one upsert with its commit. Real
servers on loopback: three members of etcd with their fsync, one PostgreSQL.
"""

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from emberfs.kv.etcd_link import EtcdLink
from emberfs.kv.rocks import RocksStore
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.kv.url import open_engine
from emberfs.proto import etcd_pb2 as pb
from emberfs.runtime.real import RealEnv
from kv_servers import Etcd, Postgres

SECONDS = 2.0
VALUE = b"v" * 200

Step = Callable[[int], Awaitable[None]]


async def per_second(clients: int, step: Step) -> float:
    began, done = time.perf_counter(), 0

    async def one(number: int) -> None:
        nonlocal done
        index = 0
        while time.perf_counter() - began < SECONDS:
            await step((clients * 100 + number) * 1_000_000 + index)
            index += 1
            done += 1

    await asyncio.gather(*(one(number) for number in range(clients)))
    return done / (time.perf_counter() - began)


def create_on(engine: Engine) -> Step:
    """Three reads, two rows and a counter, in a directory of each client's own."""

    async def step(index: int) -> None:
        async def work(txn: Transaction) -> None:
            parent, name, inode = (
                b"Ip%d" % (index // 1_000_000),
                b"D%010d" % index,
                b"I%010d" % index,
            )
            await txn.get(parent)
            assert await txn.get(name) is None
            await txn.get(inode)
            txn.set(name, VALUE)
            txn.set(inode, VALUE)
            txn.set(parent, VALUE)
            txn.add(b"Cinodes", 1)

        await engine.run(work, durable=True)

    return step


async def compare(name: str, url: str, bare: Step) -> None:
    engine = await open_engine(RealEnv(), url, timeout_ns=20 * 10**9)
    for clients in (1, 16):
        limit = await per_second(clients, bare)
        before = engine.conflicts
        made = await per_second(clients, create_on(engine))
        print(
            f"{name}, {clients} clients: {made:.0f}/s, limit {limit:.0f}/s (bare server), "
            f"ratio {made / limit:.2f}, {engine.conflicts - before} conflicts"
        )
    await engine.close()


async def bench_rocks(path: str) -> None:
    env, store = RealEnv(), RocksStore(f"{path}/bare")

    async def bare(index: int) -> None:
        for kind in range(3):
            store.get(b"z%d%010d" % (kind, index))
        store.write([(b"z%d%010d" % (kind, index), VALUE) for kind in range(4)])
        await env.run_blocking(store.sync)

    await compare("rocks", f"rocks://{path}/kv", bare)
    store.close()


async def bench_etcd(cluster: Etcd) -> None:
    link = EtcdLink(tuple(cluster.hosts.split(",")))

    async def bare(index: int) -> None:
        answer = await link.range(pb.RangeRequest(key=b"bare/%d" % index))
        for _ in range(2):
            revision = answer.header.revision
            await link.range(
                pb.RangeRequest(key=b"bare/%d" % index, revision=revision, serializable=True)
            )
        put = pb.PutRequest(key=b"bare/%d" % index, value=VALUE * 3)
        await link.txn(pb.TxnRequest(success=[pb.RequestOp(request_put=put)]), writes=True)

    await compare("etcd", f"etcd://{cluster.hosts}/bench", bare)
    await link.close()


async def bench_postgres(server: Postgres) -> None:
    import psycopg

    pool = [await psycopg.AsyncConnection.connect(server.url) for _ in range(16)]
    await pool[0].execute("CREATE TABLE bare (k bytea PRIMARY KEY, v bytea)")
    await pool[0].commit()

    async def bare(index: int) -> None:
        connection = pool[index // 1_000_000 % 100 % 16]
        key = b"%010d" % index
        for _ in range(3):
            await connection.execute("SELECT v FROM bare WHERE k = %b", (key,))
        await connection.execute("INSERT INTO bare VALUES (%b, %b)", (key, VALUE * 3))
        await connection.commit()

    await compare("postgres", server.url, bare)
    for connection in pool:
        await connection.close()


def main() -> int:
    path = tempfile.mkdtemp(prefix="emberfs-bench-")
    cluster, server = Etcd(3), Postgres()
    try:
        asyncio.run(bench_rocks(path))
        asyncio.run(bench_etcd(cluster))
        asyncio.run(bench_postgres(server))
    finally:
        cluster.stop()
        server.stop()
        shutil.rmtree(path, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
