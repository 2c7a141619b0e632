"""Figures of a whole cluster on this host, each beside the limit measured in the same run.

Native reads go through the client library in this process; FUSE figures through a real mount.
`emberfs` keeps 3 replicas. Prints: what, figure, limit, ratio, what the limit is.
"""

import asyncio
import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import uvloop

from emberfs.client.cluster import Cluster
from emberfs.fabric.region import Region, Slice
from emberfs.proto.files import Inode
from emberfs.proto.ids import SECOND, KiB, MiB
from emberfs.proto.meta_calls import Caller
from emberfs.runtime.real import RealEnv

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from integration.harness import LocalCluster, local_cluster, run

FILE_BYTES = 64 * MiB
WRITE_BYTES = 256 * MiB
SECONDS = 2.0
ROOT = Caller(0, 0)


def report(what: str, figure: float, unit: str, limit: float, said: str) -> None:
    figures = f"{figure:10.0f} {unit:6} limit {limit:10.0f}  ratio {figure / limit:5.2f}"
    print(f"{what:44} {figures}  ({said})", flush=True)


def preadv_limit(path: Path, block: int) -> float:
    """Blocks per second of a plain preadv loop over the same cached bytes."""
    region = Region(block)
    fd = os.open(path, os.O_RDONLY)
    offsets = random_offsets(block)
    for at in range(0, FILE_BYTES, MiB):
        os.pread(fd, MiB, at)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        for offset in offsets[:256]:
            os.preadv(fd, [region.view[:block]], offset)
        count += min(256, len(offsets))
    os.close(fd)
    return count / (time.perf_counter() - began)


def socket_limit(path: Path) -> float:
    """MiB per second of a bare sendfile-to-recv_into loop over loopback TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = os.fork()
        if sender == 0:
            _send_for_ever(path, listener.getsockname()[1])
        wire, _ = listener.accept()
    region, received, began = Region(MiB), 0, time.perf_counter()
    with wire:
        while time.perf_counter() - began < SECONDS:
            received += wire.recv_into(region.view)
        took_s = time.perf_counter() - began
    os.waitpid(sender, 0)
    return received / MiB / took_s


def _send_for_ever(path: Path, port: int) -> NoReturn:
    with socket.create_connection(("127.0.0.1", port)) as wire, path.open("rb") as file:
        try:
            while True:
                sent = 0
                while sent < MiB:
                    sent += os.sendfile(wire.fileno(), file.fileno(), sent, MiB - sent)
        except OSError:
            os._exit(0)


def write_limit(directory: Path) -> float:
    """Logical MiB per second when every byte is written three times and synced at the end."""
    data = os.urandom(MiB)
    began = time.perf_counter()
    fd = os.open(directory / "raw", os.O_WRONLY | os.O_CREAT)
    for _ in range(3 * WRITE_BYTES // MiB):
        os.write(fd, data)
    os.fsync(fd)
    os.close(fd)
    took_s = time.perf_counter() - began
    (directory / "raw").unlink()
    return WRITE_BYTES / MiB / took_s


def random_offsets(block: int) -> list[int]:
    offsets = list(range(0, FILE_BYTES, block))
    random.Random(1).shuffle(offsets)
    return offsets


async def native_reads(cluster: LocalCluster, *, transport: str, block: int, batch: int) -> float:
    """Blocks per second of batched native reads by one process."""
    env = RealEnv()
    if transport == "tcp":
        env.host_key = "another-host"  # no memory can be shared then
    client = await Cluster.open(
        env, (cluster.plan.mgmtd_address,), cluster.plan.cluster, timeout_ns=10 * SECOND
    )
    try:
        inode = await client.metadata.resolve(ROOT, b"/bench")
        return await read_loop(client, inode, block, batch)
    finally:
        await client.close()


async def read_loop(client: Cluster, inode: Inode, block: int, batch: int) -> float:
    assert inode.layout is not None
    region = Region(block * batch * 2)
    offsets = random_offsets(block)
    sinks: list[list[Slice]] = [
        [region.slice((lane * batch + n) * block, block) for n in range(batch)] for lane in (0, 1)
    ]
    count, place, stop = 0, 0, time.perf_counter() + SECONDS

    async def lane(number: int) -> None:
        nonlocal count, place
        while time.perf_counter() < stop:
            jobs = []
            for sink in sinks[number]:
                jobs.append((inode.id, inode.layout, offsets[place % len(offsets)], sink))
                place += 1
            await client.chunkio.read_many(jobs)
            count += batch

    began = time.perf_counter()
    await asyncio.gather(lane(0), lane(1))
    return count / (time.perf_counter() - began)


def fio(directory: Path, **options: object) -> dict[str, float]:
    if "end_fsync" not in options:
        options |= {"runtime": SECONDS + 2, "time_based": 1}
    done = run(
        "fio", "--name=bench", f"--directory={directory}", "--ioengine=psync",
        "--output-format=json", "--group_reporting",
        f"--filename={options.pop('filename', 'bench')}",
        f"--size={WRITE_BYTES if 'end_fsync' in options else FILE_BYTES}",
        *(f"--{key}={value}" for key, value in options.items()),
    )  # fmt: skip
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = "write" if "write" in str(options["rw"]) else "read"
    return {"iops": job[side]["iops"], "mib": job[side]["bw_bytes"] / MiB}


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
            )
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
    figure = fio(cluster.mount, rw="write", bs="1m", end_fsync=1, filename="fresh")["mib"]
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
