"""Figures of a whole cluster on this host, each beside the limit measured in the same run.

Native reads go through the client library in this process; FUSE figures through a real mount.
`emberfs` keeps 3 replicas. Prints: what, figure, limit, ratio, what the limit is.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import uvloop
from fiorun import one_job
from measure import (
    FILE_BYTES,
    SECONDS,
    WRITE_BYTES,
    Pace,
    preadv_limit,
    random_offsets,
    report,
    socket_limit,
    write_limit,
)

from emberfs.client.cluster import Cluster
from emberfs.fabric.region import Region, Slice
from emberfs.proto.files import Inode
from emberfs.proto.ids import SECOND, KiB, MiB
from emberfs.proto.meta_calls import Caller
from emberfs.runtime.real import RealEnv
from integration.harness import LocalCluster, local_cluster

ROOT = Caller(0, 0)


async def native_reads(
    cluster: LocalCluster,
    *,
    transport: str,
    block: int,
    batch: int,
    seconds: float = SECONDS,
    file_bytes: int = FILE_BYTES,
) -> Pace:
    """Batched native reads of `bench` by one process, two batches at a time."""
    env = RealEnv()
    if transport == "tcp":
        env.host_key = "another-host"  # no memory can be shared then
    client = await Cluster.open(
        env, (cluster.plan.mgmtd_address,), cluster.plan.cluster, timeout_ns=10 * SECOND
    )
    try:
        inode = await client.metadata.resolve(ROOT, b"/bench")
        return await read_loop(client, inode, block, batch, seconds, file_bytes)
    finally:
        await client.close()


async def read_loop(
    client: Cluster, inode: Inode, block: int, batch: int, seconds: float, file_bytes: int
) -> Pace:
    assert inode.layout is not None
    region = Region(block * batch * 2)
    offsets = random_offsets(block, file_bytes)
    sinks: list[list[Slice]] = [
        [region.slice((lane * batch + n) * block, block) for n in range(batch)] for lane in (0, 1)
    ]
    count, place, stop = 0, 0, time.perf_counter() + seconds

    async def lane(number: int) -> None:
        nonlocal count, place
        while True:
            jobs = []
            for sink in sinks[number]:
                jobs.append((inode.id, inode.layout, offsets[place % len(offsets)], sink))
                place += 1
            await client.chunkio.read_many(jobs)
            count += batch
            if time.perf_counter() >= stop:
                return

    began = time.perf_counter()
    await asyncio.gather(lane(0), lane(1))
    took_s = time.perf_counter() - began
    region.close()
    return Pace(count, took_s)


def fio(directory: Path, **options: object) -> dict[str, float]:
    fresh = "end_fsync" in options
    figure = one_job(
        directory,
        0 if fresh else SECONDS + 2,
        filename="fresh" if fresh else "bench",
        size=WRITE_BYTES if fresh else FILE_BYTES,
        **options,
    )
    return {"iops": figure.iops, "mib": figure.bytes_per_s / MiB}


def names_per_second(directory: Path, count: int = 600) -> dict[str, float]:
    """create + write 4 KiB + close, stat, rename, unlink by one process."""
    directory.mkdir(exist_ok=True)
    data, found = os.urandom(4 * KiB), {}

    def timed(what: str, work: Callable[[int], object]) -> None:
        began = time.perf_counter()
        for number in range(count):
            work(number)
        found[what] = count / (time.perf_counter() - began)

    timed("create+write 4 KiB+close", lambda n: (directory / f"f{n}").write_bytes(data))
    timed("stat", lambda n: os.stat(directory / f"f{n}"))
    timed("rename", lambda n: os.rename(directory / f"f{n}", directory / f"g{n}"))
    timed("unlink", lambda n: os.unlink(directory / f"g{n}"))
    return found


def bench(cluster: LocalCluster) -> None:
    local = cluster.root / "local"
    local.mkdir()
    data = random.Random(2).randbytes(FILE_BYTES)
    for place in (cluster.mount, local):
        with (place / "bench").open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())
    for block, batch, unit in ((MiB, 8, "MiB/s"), (4 * KiB, 64, "op/s")):
        for transport in ("shm", "tcp"):
            limit, said = preadv_limit(local / "bench", block), "preadv loop, same bytes cached"
            if transport == "tcp" and block == MiB:
                limit, said = socket_limit(local / "bench"), "sendfile to recv_into, loopback"
            figure = uvloop.run(
                native_reads(cluster, transport=transport, block=block, batch=batch)
            ).per_s
            what = f"native read {block // KiB} KiB, batch {batch}, {transport}"
            report(what, figure, unit, limit, said)
    for what, options, key in (
        ("FUSE read 1 MiB direct", {"rw": "read", "bs": "1m", "direct": 1}, "mib"),
        ("FUSE read 1 MiB buffered", {"rw": "read", "bs": "1m", "invalidate": 1}, "mib"),
        ("FUSE random read 4 KiB direct, 8 jobs",
         {"rw": "randread", "bs": "4k", "direct": 1, "numjobs": 8}, "iops"),
        ("FUSE random write 4 KiB, fsync each 32",
         {"rw": "randwrite", "bs": "4k", "fsync": 32}, "iops"),
    ):  # fmt: skip
        unit = "MiB/s" if key == "mib" else "op/s"
        figure = fio(cluster.mount, **options)[key]
        limit = fio(local, **options)[key]
        report(what, figure, unit, limit, "the same fio on the local file system, 1 copy")
    figure = fio(cluster.mount, rw="write", bs="1m", end_fsync=1)["mib"]
    limit = write_limit(local)
    report("FUSE write 1 MiB, fsync at end", figure, "MiB/s", limit, "3 times the bytes, fsync")
    limits = names_per_second(local / "names")
    for what, figure in names_per_second(cluster.mount / "names").items():
        report(f"FUSE {what}, 1 process", figure, "op/s", limits[what], "local file system")


def main() -> None:
    with local_cluster() as cluster:
        began = time.perf_counter()
        cluster.up()
        print(f"start to a mounted cluster: {time.perf_counter() - began:.1f} s")
        bench(cluster)


if __name__ == "__main__":
    main()
