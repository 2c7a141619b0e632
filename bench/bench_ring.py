"""Native reads through rings: figure, limit of the same run, ratio, and CPU of every process.

One application, one thread, batches of random blocks of a cached file; the client daemon and three
storage processes of a real cluster on this host.

python bench/bench_ring.py [--seconds 2]
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_cluster import FILE_BYTES, preadv_limit, random_offsets, report

from emberfs.client.native.connection import Connection
from emberfs.client.native.ring import Ring
from emberfs.proto.ids import KiB, MiB
from integration.harness import LocalCluster, local_cluster

TICKS = os.sysconf("SC_CLK_TCK")


class Cpu:
    """CPU seconds that processes have used since it was made."""

    def __init__(self, cluster: LocalCluster) -> None:
        names = ("fuse", *cluster.plan.storage_names())
        self._pids = {name: cluster.pid(name) for name in names} | {"app": os.getpid()}
        self._before = {name: self._used(pid) for name, pid in self._pids.items()}

    @staticmethod
    def _used(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def spent(self) -> dict[str, float]:
        """By process; the storage processes together."""
        found = {name: self._used(pid) - self._before[name] for name, pid in self._pids.items()}
        storage = sum(value for name, value in found.items() if name.startswith("storage"))
        return {"app": found["app"], "daemon": found["fuse"], "storage": storage}


def read_loop(
    cluster: LocalCluster, daemon: Connection, path: Path, block: int, depth: int, seconds: float
) -> tuple[float, dict[str, float]]:
    """Blocks per second, and CPU microseconds per block of each process."""
    offsets = random_offsets(block)
    ahead = 2 if depth > 1 else 1  # batches under way at a time, each half of the depth
    batch = max(depth // ahead, 1)
    region = daemon.region(block * batch * ahead)
    with path.open("rb") as opened, daemon.file(opened) as file, Ring(daemon, 1024) as ring:
        sinks = [
            [region.slice((lane * batch + i) * block, block) for i in range(batch)]
            for lane in range(ahead)
        ]
        place = 0

        def begin(lane: int) -> object:
            nonlocal place
            wanted = []
            for sink in sinks[lane]:
                wanted.append((file, offsets[place % len(offsets)], sink))
                place += 1
            return ring.submit(0, wanted)

        def run(until: float) -> int:
            count, lanes = 0, [begin(lane) for lane in range(ahead)]
            while time.perf_counter() < until:
                for lane in range(ahead):
                    results = ring.wait(lanes[lane])
                    assert results == [block] * batch, results
                    count += batch
                    lanes[lane] = begin(lane)
            for batch_ in lanes:
                ring.wait(batch_)
            return count

        run(time.perf_counter() + 0.3)
        cpu, began = Cpu(cluster), time.perf_counter()
        count = run(began + seconds)
        rate = count / (time.perf_counter() - began)
        spent = {name: value * 1e6 / count for name, value in cpu.spent().items()}
    region.close()
    return rate, spent


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
                    rate, spent = read_loop(cluster, daemon, path, block, depth, seconds)
                    what = f"ring read {block // KiB} KiB random, depth {depth}"
                    report(what, rate, "/s", limit, "one process's preadv loop")
                    print(" " * 8 + "CPU us per block: "
                          + ", ".join(f"{k} {v:.2f}" for k, v in spent.items()))  # fmt: skip


if __name__ == "__main__":
    main()
