"""Metadata handlers against the bare store: how much of a call is ours.

Limit: the RocksDB operations that a call cannot do without, in the same process (lookup: three
point reads; create: five point reads and one atomic batch of six rows). No network is involved.
"""

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from emberfs.fabric.call import Handler
from emberfs.kv import keys
from emberfs.kv.rocks import RocksStore
from emberfs.kv.transaction import Engine
from emberfs.meta.context import Context, Policy
from emberfs.meta.dispatch import handlers
from emberfs.meta.format import open_file_system
from emberfs.proto import meta_calls as calls
from emberfs.proto.cluster import Chain, ChainTarget, PublicState, RoutingSnapshot
from emberfs.proto.ids import ROOT_INODE
from emberfs.runtime.real import RealEnv

CALLS = 5000
WHO = calls.Caller(0, 0)


class NoChunks:
    """Chunks that nobody ever wrote."""

    async def remove_chunks(self, *_: object) -> None:
        pass

    async def truncate_chunk(self, *_: object) -> None:
        pass


class Call:
    """What a handler sees of a fabric call."""

    peer = "bench"
    body = b""


def routing() -> RoutingSnapshot:
    chain = Chain(1, 1, (ChainTarget(101, 1, PublicState.SERVING),))  # type: ignore[arg-type]
    return RoutingSnapshot("bench", 1, {}, {1: chain}, {})  # type: ignore[dict-item, arg-type]


def per_second(work: Callable[[int], Any]) -> float:
    started = time.perf_counter()
    for i in range(CALLS):
        work(i)
    return CALLS / (time.perf_counter() - started)


async def calls_per_second(handle: Handler, bodies: list[bytes]) -> float:
    call = Call()
    started = time.perf_counter()
    for body in bodies:
        call.body = body
        await handle(call)  # type: ignore[arg-type]
    return len(bodies) / (time.perf_counter() - started)


def limits(store: RocksStore) -> tuple[float, float]:
    """Return lookups and creates per second of the bare store."""
    row = b"v" * 200

    def create(i: int) -> None:
        for kind in range(5):
            store.get(b"z%d%06d" % (kind, i))
        store.write([(b"z%d%06d" % (kind, i), row) for kind in range(6)])

    def lookup(i: int) -> None:
        for kind in range(3):
            store.get(b"z%d%06d" % (kind, i))

    creates = per_second(create)
    return per_second(lookup), creates


async def bench(path: str) -> None:
    env, store = RealEnv(), RocksStore(path)
    engine = Engine(env, store)
    snapshot = routing()
    context = Context(env, engine, NoChunks(), lambda: snapshot, Policy())
    await open_file_system(engine, "bench", uid=0, gid=0, now_ns=1)
    table = handlers(context)
    lookup_limit, create_limit = limits(store)
    creates = [
        calls.CREATE.encode_request(
            calls.CreateRequest(
                WHO, calls.RequestId(1, i + 1), ROOT_INODE, b"f%06d" % i, 0o644, i + 1, write=True
            )
        )
        for i in range(CALLS)
    ]
    lookups = [
        calls.LOOKUP.encode_request(calls.LookupRequest(WHO, ROOT_INODE, b"f%06d" % i))
        for i in range(CALLS)
    ]
    made = await calls_per_second(table[calls.CREATE.number], creates)
    found = await calls_per_second(table[calls.LOOKUP.number], lookups)
    for name, figure, limit in (("create", made, create_limit), ("lookup", found, lookup_limit)):
        print(
            f"meta {name}: {figure:.0f}/s, limit {limit:.0f}/s (store), ratio {figure / limit:.2f}"
        )
    assert len(store.scan(*keys.entry_span(ROOT_INODE))) == CALLS
    await engine.close()


def main() -> int:
    path = tempfile.mkdtemp(prefix="emberfs-bench-")
    try:
        asyncio.run(bench(path))
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
