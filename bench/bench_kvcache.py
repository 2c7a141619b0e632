"""Figures of the KV cache, each beside its limit in the same run, and a picture over time.

python bench/bench_kvcache.py [--seconds 20] [--picture FILE.png]

A cluster of three replicas on this host. Blocks are FlashMLA's paged latent cache: 64 tokens of
576 values of bf16, 73,728 bytes a layer; batches of 64. The picture needs the group `bench` of
pyproject (matplotlib): read throughput and removals while both go on, as 3FS shows them.
"""

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import uvloop

from emberfs.client.file import FileSystem, connect
from emberfs.client.kvcache.cache import BLOCK_BYTES, KVCache
from emberfs.fabric.region import Region
from emberfs.proto.ids import SECOND, GiB, MiB

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from integration.harness import LocalCluster, local_cluster

BATCH = 64
BLOCKS = 2048  # 144 MiB
LIMIT_SECONDS = 2.0
TINY = 131_072  # blocks of 16 bytes, only there to be removed
REMOVE_BATCH = 16_384
TICK_S = 0.5
PATIENT_NS = 60 * SECOND


def report(what: str, figure: float, unit: str, limit: float, said: str) -> None:
    figures = f"{figure:12.0f} {unit:6} limit {limit:10.0f}  ratio {figure / limit:5.2f}"
    print(f"{what:46} {figures}  ({said})", flush=True)


def rate(work: Callable[[], int], seconds: float = LIMIT_SECONDS) -> float:
    """Units per second of work that says how many units each call did."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += work()
    return count / (time.perf_counter() - began)


def read_limit(path: Path, order: Sequence[int]) -> float:
    """MiB per second of a plain preadv loop over the same bytes in the page cache."""
    region, place = Region(BLOCK_BYTES), 0
    fd = os.open(path, os.O_RDONLY)

    def some() -> int:
        nonlocal place
        for _ in range(BATCH):
            os.preadv(fd, [region.view[:BLOCK_BYTES]], order[place] * BLOCK_BYTES)
            place = (place + 1) % len(order)
        return BATCH

    found = rate(some)
    os.close(fd)
    return found * BLOCK_BYTES / MiB


def write_limit(path: Path, blocks: Sequence[bytes]) -> float:
    """MiB per second of writing every block three times, not synced."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    began = time.perf_counter()
    for copy in range(3):
        for number, block in enumerate(blocks):
            os.pwrite(fd, block, (copy * len(blocks) + number) * BLOCK_BYTES)
    took_s = time.perf_counter() - began
    os.close(fd)
    path.unlink()
    return len(blocks) * BLOCK_BYTES / MiB / took_s


def batches(order: Sequence[int]) -> list[list[int]]:
    return [list(order[at : at + BATCH]) for at in range(0, len(order), BATCH)]


async def put_all(cache: KVCache, keys: Sequence[bytes], blocks: Sequence[bytes]) -> float:
    """MiB per second, two batches under way."""
    queue = batches(range(len(keys)))
    began = time.perf_counter()

    async def lane() -> None:
        while queue:
            some = queue.pop()
            names, data = [keys[n] for n in some], [blocks[n] for n in some]
            stored = await cache.put_many(names, data, deadline_ns=PATIENT_NS)
            assert all(stored), "a block was not stored"

    await asyncio.gather(lane(), lane())
    return len(keys) * BLOCK_BYTES / MiB / (time.perf_counter() - began)


class Readers:
    """Two lanes that read batches of 64 blocks for as long as they are told to."""

    def __init__(self, fs: FileSystem, cache: KVCache, keys: Sequence[bytes]) -> None:
        self._cache = cache
        self._keys = keys
        self._region = fs.allocate(2 * BATCH * BLOCK_BYTES)
        self.blocks = 0
        self.misses = 0

    async def run(self, order: Sequence[int], seconds: float) -> float:
        """MiB per second."""
        began, first, todo, place = time.perf_counter(), self.blocks, batches(order), 0

        async def lane(number: int) -> None:
            nonlocal place
            at = number * BATCH * BLOCK_BYTES
            sinks = [self._region.slice(at + n * BLOCK_BYTES, BLOCK_BYTES) for n in range(BATCH)]
            while time.perf_counter() - began < seconds:
                some = todo[place % len(todo)]
                place += 1
                found = await self._cache.get_many(
                    [self._keys[n] for n in some], sinks, deadline_ns=PATIENT_NS
                )
                self.blocks += sum(length > 0 for length in found)
                self.misses += sum(not length for length in found)

        await asyncio.gather(lane(0), lane(1))
        took_s = time.perf_counter() - began
        return (self.blocks - first) * BLOCK_BYTES / MiB / took_s


async def put_tiny(cache: KVCache, prefix: bytes, count: int) -> list[bytes]:
    keys = [prefix + n.to_bytes(8, "big") for n in range(count)]
    for at in range(0, count, 1024):
        part = keys[at : at + 1024]
        stored = await cache.put_many(part, [bytes(16)] * len(part), deadline_ns=PATIENT_NS)
        assert all(stored), "a block was not stored"
    return keys


async def remove_all(cache: KVCache, keys: Sequence[bytes], batch: int) -> float:
    """Removals per second, published in the log of this process."""
    began = time.perf_counter()
    for at in range(0, len(keys), batch):
        gone = await cache.remove_many(keys[at : at + batch], deadline_ns=PATIENT_NS)
        assert all(gone), "a block was not removed"
    return len(keys) / (time.perf_counter() - began)


def unlink_limit(directory: Path, count: int = 4000) -> float:
    """Files per second removed by one process: what a file for each block would cost at least."""
    directory.mkdir()
    paths = [directory / str(number) for number in range(count)]
    for path in paths:
        path.touch()
    began = time.perf_counter()
    for path in paths:
        path.unlink()
    took_s = time.perf_counter() - began
    directory.rmdir()
    return count / took_s


async def figures(cluster: LocalCluster, fs: FileSystem) -> None:
    dice = random.Random(3)
    keys = [dice.randbytes(16) for _ in range(BLOCKS)]
    blocks = [dice.randbytes(BLOCK_BYTES) for _ in range(BLOCKS)]
    raw = cluster.root / "raw"
    raw.write_bytes(b"".join(blocks))
    straight, shuffled = list(range(BLOCKS)), dice.sample(range(BLOCKS), BLOCKS)
    opened = await KVCache.open(fs, "/kv", namespace=("bench", 0), byte_cap=2 * GiB)
    async with opened as cache:
        limit = write_limit(cluster.root / "copies", blocks)
        figure = await put_all(cache, keys, blocks)
        said = "pwrite of 3 times the bytes, not synced"
        report("put 72 KiB, batch 64, 3 replicas", figure, "MiB/s", limit, said)
        readers = Readers(fs, cache, keys)
        for name, order in (("as they were put", straight), ("in random order", shuffled)):
            await readers.run(order, 0.5)
            limit, said = read_limit(raw, order), "preadv loop, same bytes cached, no checks"
            figure = await readers.run(order, LIMIT_SECONDS)
            report(f"get 72 KiB, batch 64, {name}", figure, "MiB/s", limit, said)
        assert not readers.misses, "a block was not found"
        for batch in (64, 1024, REMOVE_BATCH):
            some = await put_tiny(cache, b"%d" % batch, min(TINY, 128 * batch))
            limit, said = unlink_limit(cluster.root / "names"), "unlink of plain local files"
            figure = await remove_all(cache, some, batch)
            report(f"remove, batch {batch}", figure, "per s", limit, said)


async def over_time(fs: FileSystem, seconds: float) -> list[tuple[float, float, float]]:
    """(second, GiB/s read, thousand removals/s), while blocks are put and removed beside."""
    dice = random.Random(5)
    keys = [dice.randbytes(16) for _ in range(BLOCKS)]
    blocks = [dice.randbytes(BLOCK_BYTES) for _ in range(BLOCKS)]
    samples: list[tuple[float, float, float]] = []
    removed, over = 0, False
    read = await KVCache.open(fs, "/kv", namespace="read", byte_cap=2 * GiB)
    collected = await KVCache.open(fs, "/kv", namespace="collected", byte_cap=2 * GiB)
    async with read, collected:
        await put_all(read, keys, blocks)
        readers = Readers(fs, read, keys)

        async def collect() -> None:
            nonlocal removed
            turn = 0
            while not over:
                turn += 1
                some = await put_tiny(collected, b"turn %d" % turn, 2 * REMOVE_BATCH)
                for at in range(0, len(some), REMOVE_BATCH):
                    part = some[at : at + REMOVE_BATCH]
                    removed += sum(await collected.remove_many(part, deadline_ns=PATIENT_NS))

        async def watch() -> None:
            began = last = time.perf_counter()
            blocks_before = removed_before = 0
            while not over:
                await asyncio.sleep(TICK_S)
                now = time.perf_counter()
                gib = (readers.blocks - blocks_before) * BLOCK_BYTES / GiB / (now - last)
                thousands = (removed - removed_before) / 1000 / (now - last)
                samples.append((now - began, gib, thousands))
                last, blocks_before, removed_before = now, readers.blocks, removed

        beside = asyncio.gather(collect(), watch())
        await readers.run(list(range(BLOCKS)), seconds)
        over = True
        await beside
    return samples


def draw(samples: Sequence[tuple[float, float, float]], picture: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install --group plots")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds, read, removals = zip(*samples, strict=True)
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6))
    above.plot(seconds, read, color="tab:blue")
    above.axhline(sum(read) / len(read), color="tab:blue", linestyle=":", label="mean")
    above.set_ylabel("read, GiB/s")
    above.legend()
    below.plot(seconds, removals, color="tab:red")
    below.set_ylabel("removals, thousands/s")
    below.set_xlabel("seconds")
    for panel in (above, below):
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    figure.suptitle("KV cache: one process reads, puts and removes; 3 replicas on one host")
    figure.savefig(picture, dpi=120)
    print(f"picture: {picture}")


async def bench(cluster: LocalCluster, seconds: float) -> list[tuple[float, float, float]]:
    plan = cluster.plan
    async with connect(plan.mgmtd_address, cluster=plan.cluster) as fs:
        await figures(cluster, fs)
        return await over_time(fs, seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20.0, help="of the picture")
    parser.add_argument("--picture", type=Path, default=Path("bench_kvcache.png"))
    arguments = parser.parse_args()
    with local_cluster() as cluster:
        cluster.up()
        samples = uvloop.run(bench(cluster, arguments.seconds))
    read = [sample[1] for sample in samples]
    removals = [sample[2] for sample in samples]
    mean = sum(read) / len(read)
    print(f"together: read mean {mean:.2f}, peak {max(read):.2f} GiB/s; ", end="")
    print(f"removals mean {sum(removals) / len(removals):.1f}, peak {max(removals):.1f} k/s")
    draw(samples, arguments.picture)


if __name__ == "__main__":
    main()
