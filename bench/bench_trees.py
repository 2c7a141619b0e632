"""What quotas cost, and what removing a tree in one step saves: metadata handlers in one process.

Limits, in the same run: creates without a quota, in turns with the others, so that all meet the
same machine; removing the same tree name by name.
"""

import asyncio
import shutil
import sys
import tempfile
import time

from emberfs.kv.rocks import RocksStore
from emberfs.kv.transaction import Engine
from emberfs.meta import namespace, quota_calls, resolve, tree_calls
from emberfs.meta.context import Context, Policy
from emberfs.meta.files import setattr_
from emberfs.meta.format import open_file_system
from emberfs.proto import meta_calls as calls
from emberfs.proto import quota_calls as requests
from emberfs.proto.cluster import Chain, ChainTarget, PublicState, RoutingSnapshot
from emberfs.proto.files import Inode
from emberfs.proto.ids import ROOT_INODE, InodeId
from emberfs.runtime.real import RealEnv

ROUNDS, PER_ROUND = 40, 50
TREE_DIRECTORIES, TREE_FILES = 20, 250
DIRECTORY, FILE = 0o040755, 0o100644
WHO = calls.Caller(0, 0)
USER = calls.Caller(1000, 1000)


class Bench:
    """One metadata server without a network."""

    def __init__(self, path: str) -> None:
        env = RealEnv()
        chain = Chain(1, 1, (ChainTarget(101, 1, PublicState.SERVING),))  # type: ignore[arg-type]
        snapshot = RoutingSnapshot("bench", 1, {}, {1: chain}, {})  # type: ignore[dict-item, arg-type]
        self.engine = Engine(env, RocksStore(path))
        self.context = Context(env, self.engine, None, lambda: snapshot, Policy())  # type: ignore[arg-type]
        self.sequence = 0

    def request(self) -> calls.RequestId:
        self.sequence += 1
        return calls.RequestId(1, self.sequence)

    async def make(
        self, parent: InodeId, name: str, mode: int = FILE, who: calls.Caller = WHO
    ) -> InodeId:
        request = calls.MknodRequest(who, self.request(), parent, name.encode(), mode)
        return (await namespace.mknod(self.context, request)).inode.id

    async def remove(self, parent: InodeId, name: str, *, directory: bool) -> None:
        request = calls.RemoveRequest(
            WHO, self.request(), parent, name.encode(), directory=directory
        )
        await namespace.remove(self.context, request)

    async def limit(self, directory: InodeId) -> None:
        request = requests.SetQuotaRequest(WHO, self.request(), directory, 1 << 50, 10**9)
        await quota_calls.set_quota(self.context, request)

    async def remove_tree(self, name: str, who: calls.Caller = WHO) -> None:
        request = requests.RemoveTreeRequest(who, self.request(), ROOT_INODE, name.encode())
        await tree_calls.remove_tree(self.context, request)

    async def tree(self, name: str, who: calls.Caller = WHO) -> InodeId:
        top = await self.make(ROOT_INODE, name, DIRECTORY, who)
        for number in range(TREE_DIRECTORIES):
            inner = await self.make(top, str(number), DIRECTORY, who)
            for file in range(TREE_FILES):
                await self.make(inner, str(file), FILE, who)
        return top


async def creates(bench: Bench) -> None:
    """In turns below no quota, one, and three inside each other."""
    places = [await bench.make(ROOT_INODE, f"plain{n}", DIRECTORY) for n in range(3)]
    await bench.limit(places[1])
    await bench.limit(places[2])
    for _ in range(2):
        places[2] = await bench.make(places[2], "inner", DIRECTORY)
        await bench.limit(places[2])
    await bench.context.quota_walks.finish()
    seconds = [0.0, 0.0, 0.0]
    for turn in range(ROUNDS):
        for at, place in enumerate(places):
            started = time.perf_counter()
            for number in range(PER_ROUND):
                await bench.make(place, f"{turn}-{number}")
            seconds[at] += time.perf_counter() - started
    rates = [ROUNDS * PER_ROUND / one for one in seconds]
    print(f"meta create: {rates[0]:.0f}/s without a quota")
    for at, what in ((1, "below one quota"), (2, "below three")):
        print(f"meta create {what}: {rates[at]:.0f}/s, ratio {rates[at] / rates[0]:.2f}")


async def trees(bench: Bench) -> None:
    names = TREE_DIRECTORIES * (TREE_FILES + 1)
    for_all = calls.SetattrRequest(WHO, bench.request(), ROOT_INODE, mode=0o777)
    await setattr_(bench.context, for_all)
    top = await bench.tree("counted")
    started = time.perf_counter()
    await bench.limit(top)
    set_s = time.perf_counter() - started
    await bench.context.quota_walks.finish()
    rate = names / (time.perf_counter() - started)
    print(f"quota set on {names} names: {set_s * 1e3:.1f} ms, counted at {rate:.0f} names/s")
    top = await bench.tree("slow")
    started = time.perf_counter()
    for number in range(TREE_DIRECTORIES):
        inner = (await _lookup(bench, top, str(number))).id
        for file in range(TREE_FILES):
            await bench.remove(inner, str(file), directory=False)
        await bench.remove(top, str(number), directory=True)
    await bench.remove(ROOT_INODE, "slow", directory=True)
    limit_s = time.perf_counter() - started
    await bench.tree("fast")
    await bench.tree("mine", USER)
    for name, who, what in (("fast", WHO, "uid 0"), ("mine", USER, "its owner")):
        started = time.perf_counter()
        await bench.remove_tree(name, who)
        seen_s = time.perf_counter() - started
        print(
            f"remove_tree of {names} names by {what}: {seen_s * 1e3:.1f} ms, "
            f"name by name {limit_s:.2f} s, ratio {limit_s / seen_s:.0f}"
        )
        await bench.context.removed_trees.finish()
        rate = names / (time.perf_counter() - started)
        print(f"  in the background: {rate:.0f} names/s, ratio {rate * limit_s / names:.2f}")


async def _lookup(bench: Bench, parent: InodeId, name: str) -> Inode:
    request = calls.LookupRequest(WHO, parent, name.encode())
    return (await resolve.lookup(bench.context, request)).inode


async def run(path: str) -> None:
    bench = Bench(path)
    await open_file_system(bench.engine, "bench", uid=0, gid=0, now_ns=1)
    await creates(bench)
    await trees(bench)
    await bench.engine.close()


def main() -> int:
    path = tempfile.mkdtemp(prefix="emberfs-bench-")
    try:
        asyncio.run(run(path))
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
