"""Read throughput against block size and against depth, of rings and through the mount."""

from collections.abc import Callable
from pathlib import Path

import fiorun
from bench_ring import read_loop
from measure import named
from pictures import Panel, draw

from emberfs.client.native.connection import Connection
from emberfs.proto.ids import KiB
from integration.harness import LocalCluster

BLOCKS_BYTES = tuple(4 * KiB << n for n in range(0, 11, 2))  # 4 KiB to 4 MiB
BLOCK_DEPTH = 8
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
Line = list[float | None]


def draw_all(
    cluster: LocalCluster, daemon: Connection, seconds: float, file_bytes: int, target: Path
) -> dict[str, object]:
    """Measure both, of the file `bench`, draw them, and return the figures."""
    target.mkdir(parents=True, exist_ok=True)

    def ring(block: int, depth: int) -> float:
        path = cluster.mount / "bench"
        pace, _ = read_loop(cluster, daemon, path, block, depth, seconds, file_bytes)
        return pace.per_s

    def mount(engine: str) -> Callable[[int, int], float]:
        def perform(block: int, depth: int) -> float:
            return fiorun.one_job(
                cluster.mount, seconds, rw="randread", bs=block, size=file_bytes, direct=1,
                filename="bench", ioengine=engine, iodepth=depth,
            ).iops  # fmt: skip

        return perform

    by_block = lines(
        {f"rings, depth {BLOCK_DEPTH}": ring, "FUSE, psync, O_DIRECT": mount("psync")},
        [(block, BLOCK_DEPTH) for block in BLOCKS_BYTES if block <= file_bytes],
        by_bytes=True,
    )
    by_depth = lines(
        {
            "rings": ring,
            "FUSE, libaio, O_DIRECT": mount("libaio"),
            "FUSE, io_uring, O_DIRECT": mount("io_uring"),
        },
        [(4 * KiB, depth) for depth in DEPTHS],
        by_bytes=False,
    )
    blocks = [block / KiB for block in BLOCKS_BYTES if block <= file_bytes]
    labels = [named(int(block * KiB)) for block in blocks]
    of_block = Panel("random reads", "block", "MB/s", blocks, by_block, labels)
    of_depth = Panel("4 KiB random reads", "in flight", "reads per second", DEPTHS, by_depth)
    draw([of_block], target / "bench_block_size.png")
    draw([of_depth], target / "bench_depth.png")
    return {
        "block_size": {"kib": blocks, "mb_per_s": by_block},
        "depth": {"depth": DEPTHS, "per_s": by_depth},
    }


def lines(
    ways: dict[str, Callable[[int, int], float]], points: list[tuple[int, int]], *, by_bytes: bool
) -> dict[str, Line]:
    """Each way at each (block bytes, depth); what cannot be done there at all is left out."""
    found: dict[str, Line] = {}
    for name, perform in ways.items():
        line: Line = []
        try:
            for block, depth in points:
                per_s = perform(block, depth)
                line.append(per_s * block / 1e6 if by_bytes else per_s)
        except fiorun.FioError as problem:
            print(f"{name}: {problem}")
            line += [None] * (len(points) - len(line))
        if any(line):
            found[name] = line
            told = ", ".join("-" if height is None else f"{height:.0f}" for height in line)
            print(f"  {name}: {told}", flush=True)
    return found
