"""Native reads through rings: figure, limit of the same run, ratio, and CPU of every process.

One application, one thread, batches of random blocks of a cached file; the client daemon and three
storage processes of a real cluster on this host.

python bench/bench_ring.py [--seconds 2]
"""

import argparse
import os
import time
from pathlib import Path

from measure import FILE_BYTES, Cpu, Pace, named, preadv_limit, random_offsets, report

from emberfs.client.native.connection import Connection
from emberfs.client.native.ring import Batch, Result, Ring
from emberfs.proto.ids import KiB, MiB
from integration.harness import LocalCluster, local_cluster

WARM_S = 0.3


def read_loop(
    cluster: LocalCluster,
    daemon: Connection,
    path: Path,
    block: int,
    depth: int,
    seconds: float,
    file_bytes: int = FILE_BYTES,
    warm_s: float = WARM_S,
) -> tuple[Pace, dict[str, float]]:
    """Blocks in how long, and the CPU seconds that they took of each group of processes."""
    offsets = random_offsets(block, file_bytes)
    ahead = 2 if depth > 1 else 1  # batches under way at a time, each half of the depth
    batch = max(depth // ahead, 1)
    region = daemon.region(block * batch * ahead)
    with path.open("rb") as opened, daemon.file(opened) as file, Ring(daemon, 1024) as ring:
        sinks = [
            [region.slice((lane * batch + i) * block, block) for i in range(batch)]
            for lane in range(ahead)
        ]
        place = 0

        def begin(lane: int) -> Batch:
            nonlocal place
            wanted = []
            for sink in sinks[lane]:
                wanted.append((file, offsets[place % len(offsets)], sink))
                place += 1
            return ring.submit(0, wanted)

        def check(results: list[Result]) -> None:
            if results != [block] * batch:
                raise OSError(f"short or failed reads: {results}")

        def run(until: float) -> int:
            count, lanes = 0, [begin(lane) for lane in range(ahead)]
            while time.perf_counter() < until:
                for lane in range(ahead):
                    check(ring.wait(lanes[lane]))
                    count += batch
                    lanes[lane] = begin(lane)
            for batch_ in lanes:
                check(ring.wait(batch_))
                count += batch
            return count

        run(time.perf_counter() + min(seconds, warm_s))
        cpu, began = Cpu(cluster), time.perf_counter()
        pace = Pace(run(began + seconds), time.perf_counter() - began)
        spent = cpu.spent()
    region.close()
    return pace, spent


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    seconds = parser.parse_args().seconds
    with local_cluster() as cluster:
        cluster.up()
        data = os.urandom(FILE_BYTES)
        path, local = cluster.mount / "bench", cluster.root / "bench"
        path.write_bytes(data)
        local.write_bytes(data)
        with Connection(cluster.mount) as daemon:
            small, large = (4 * KiB, (1, 4, 16, 64, 256)), (MiB, (1, 16))
            for block, depths in (small, (64 * KiB, (16,)), large):
                for depth in depths:
                    limit = preadv_limit(local, block)
                    pace, spent = read_loop(cluster, daemon, path, block, depth, seconds)
                    what = f"ring read {named(block)} random, depth {depth}"
                    report(what, pace.per_s, "/s", limit, "one process's preadv loop")
                    each = (f"{k} {v * 1e6 / pace.count:.2f}" for k, v in spent.items())
                    print(" " * 8 + "CPU us per block: " + ", ".join(each))


if __name__ == "__main__":
    main()
