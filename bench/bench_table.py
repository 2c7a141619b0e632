"""The table of budgets in one run: figure, limit, ratio, goal, met or missed, and whose CPU.

usage: bench_table.py [--seconds 3] [--size-mib 512] [--json FILE] [--plots DIRECTORY]

A cluster of three replicas, fio, the limits and what they are compared with share this host. A
limit is measured in this run, right before what is divided by it; where the goal is to beat another
file system, it is that one's figure on a comparable machine, a fixed number, and marked `peer`.
With --plots, read throughput against block size and depth is drawn as well (another minute).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import curves
import fiorun
import rows
import uvloop
from bench_cluster import native_reads
from bench_metadata import Step, passthrough, rates
from bench_ring import read_loop
from measure import (
    Cpu,
    Pace,
    Written,
    lay_out,
    memory_mib,
    preadv_limit,
    repeated,
    socket_limit,
    wait_idle,
    write_limit,
    written,
)
from outage import outage
from rows import PEER, Row, cpu_of

from emberfs.client.native.connection import Connection
from emberfs.client.native.layout import WRITE
from emberfs.client.native.ring import Batch, Ring
from emberfs.fabric.region import Region
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import KiB, MiB
from integration.harness import LocalCluster, local_cluster

MB = 1_000_000
GB = 1000 * MB
PROCESSES = 4
WRITE_BATCH = 8
QUIET_S, QUIET_S_MAX = 0.5, 5.0  # until the storage services have written all
QUIET_BYTES = 64 * KiB  # heartbeats and logs in QUIET_S
EXPIRE_S = 1.3  # what the kernel knows of names and attributes has run out then
FAILURES = (OSError, EmberfsError, AssertionError, fiorun.FioError, subprocess.SubprocessError)
PREADV = "plain preadv loop of one process, same bytes cached"


class Bench(NamedTuple):
    """What the rows work with."""

    cluster: LocalCluster
    daemon: Connection
    local: Path  # a plain directory of the same file system
    through: Path | None  # libfuse's C passthrough over such a directory
    seconds: float
    size_bytes: int  # of the large file

    @property
    def file_bytes(self) -> int:
        """Size of `bench`, on the mount and in the plain directory."""
        return self.size_bytes // 8

    @property
    def written_bytes(self) -> int:
        """What a round of writing writes."""
        return self.size_bytes // 4


# ---------------------------------------------------------------- native


def native_read_large(bench: Bench) -> Iterator[Row]:
    limit = preadv_limit(bench.local / "bench", MiB, bench.seconds, bench.file_bytes)
    pace, spent = ring_reads(bench, MiB, 16)
    yield Row(
        "native read 1 MiB, batch 8, shm", pace.per_s * MiB / MB, "MB/s", 0.80,
        limit * MiB / MB, said=PREADV, cpu=cpu_of(spent, pace.count * MiB / GB), cpu_per="GB",
    )  # fmt: skip


def native_read_small(bench: Bench) -> Iterator[Row]:
    limit = preadv_limit(bench.local / "bench", 4 * KiB, bench.seconds, bench.file_bytes)
    pace, spent = ring_reads(bench, 4 * KiB, 128)
    yield Row(
        "native read 4 KiB random, batch 64, shm", pace.per_s, "/s", 0.50, limit, said=PREADV,
        cpu=cpu_of(spent, pace.count / 1000), cpu_per="1000",
    )  # fmt: skip


def ring_reads(bench: Bench, block: int, depth: int) -> tuple[Pace, dict[str, float]]:
    """Two batches under way, of half the depth each."""
    path = bench.cluster.mount / "bench"
    return read_loop(
        bench.cluster, bench.daemon, path, block, depth, bench.seconds, bench.file_bytes
    )


def native_read_tcp(bench: Bench) -> Iterator[Row]:
    limit = socket_limit(bench.local / "bench", bench.seconds)
    cpu = Cpu(bench.cluster)
    pace = uvloop.run(
        native_reads(
            bench.cluster, transport="tcp", block=MiB, batch=8, seconds=bench.seconds,
            file_bytes=bench.file_bytes,
        )
    )  # fmt: skip
    yield Row(
        "native read 1 MiB, batch 8, tcp, library", pace.per_s * MiB / MB, "MB/s", 0.85,
        limit * MiB / MB, said="bare sendfile to recv_into loop, loopback",
        cpu=cpu_of(cpu.spent(), pace.count * MiB / GB), cpu_per="GB",
    )  # fmt: skip


def native_write(bench: Bench) -> Iterator[Row]:
    before = write_limit(bench.local, bench.written_bytes)
    memory = bench.daemon.region(2 * WRITE_BATCH * MiB)
    memory.view[:] = os.urandom(MiB) * (2 * WRITE_BATCH)
    cpu = Cpu(bench.cluster)
    pace = repeated(bench.seconds, lambda: written_by_ring(bench, memory))
    spent = cpu.spent()
    memory.close()
    limit = (before + write_limit(bench.local, bench.written_bytes)) / 2
    yield Row(
        "write 1 MiB, 3 replicas, fsync at end, native", pace.per_s / MB, "MB/s", 0.80,
        limit * MiB / MB, said="raw write + fsync of three times the bytes",
        cpu=cpu_of(spent, pace.count / GB), cpu_per="GB",
    )  # fmt: skip


def written_by_ring(bench: Bench, memory: Region) -> int:
    """A new file, two batches of 1 MiB under way, one sync at the end; bytes."""
    path, lanes = bench.cluster.mount / "fresh", deque[Batch]()
    parts = [memory.slice(n * MiB, MiB) for n in range(2 * WRITE_BATCH)]
    with (
        path.open("wb") as opened,
        bench.daemon.file(opened) as file,
        Ring(bench.daemon, 4 * WRITE_BATCH) as ring,
    ):

        def settle() -> None:
            results = ring.wait(lanes.popleft())
            if any(result != MiB for result in results):
                raise OSError(f"short or failed writes: {results}")

        for first in range(0, bench.written_bytes // MiB, WRITE_BATCH):
            if len(lanes) == 2:
                settle()
            numbers = range(first, min(first + WRITE_BATCH, bench.written_bytes // MiB))
            lanes.append(
                ring.submit(WRITE, [(file, n * MiB, parts[n % len(parts)]) for n in numbers])
            )
        while lanes:
            settle()
        os.fsync(opened.fileno())
    path.unlink()
    return bench.written_bytes


# ---------------------------------------------------------------- the mount


def fuse_write(bench: Bench) -> Iterator[Row]:
    before = write_limit(bench.local, bench.written_bytes)
    cpu, mount, figures = Cpu(bench.cluster), bench.cluster.mount, []
    began = time.perf_counter()
    while not figures or time.perf_counter() - began < bench.seconds:
        figures.append(
            fiorun.one_job(
                mount, rw="write", bs="1m", size=bench.written_bytes, filename="fresh", end_fsync=1
            )
        )
        (mount / "fresh").unlink()
    spent = cpu.spent() | {"app": sum(figure.cpu_s for figure in figures)}
    written_bytes = sum(figure.io_bytes for figure in figures)
    took_s = sum(figure.io_bytes / figure.bytes_per_s for figure in figures)
    limit = (before + write_limit(bench.local, bench.written_bytes)) / 2
    yield Row(
        "write 1 MiB, 3 replicas, fsync at end, FUSE", written_bytes / took_s / MB, "MB/s", 0.80,
        limit * MiB / MB, said="raw write + fsync of three times the bytes",
        cpu=cpu_of(spent, written_bytes / GB), cpu_per="GB",
    )  # fmt: skip


def fuse_read(bench: Bench) -> Iterator[Row]:
    limit = None if bench.through is None else sequential(bench, bench.through)
    cpu = Cpu(bench.cluster)
    pace = sequential(bench, bench.cluster.mount)
    yield Row(
        "FUSE sequential read 1 MiB, cold client", pace.per_s / MB, "MB/s", 0.70,
        None if limit is None else limit.per_s / MB, said="libfuse's C passthrough, same bytes",
        cpu=cpu_of(cpu.spent(), pace.count / GB), cpu_per="GB",
    )  # fmt: skip


def sequential(bench: Bench, directory: Path) -> Pace:
    """Bytes read through the kernel's cache, of which every round first drops the file."""
    bytes_read, took_s = 0, 0.0
    while not bytes_read or took_s < bench.seconds:
        figure = fiorun.one_job(
            directory, rw="read", bs="1m", size=bench.size_bytes, filename="large", invalidate=1
        )
        bytes_read += figure.io_bytes
        took_s += figure.io_bytes / figure.bytes_per_s
    return Pace(bytes_read, took_s)


def fuse_random_read(bench: Bench) -> Iterator[Row]:
    cpu = Cpu(bench.cluster)
    figure = fiorun.one_job(
        bench.cluster.mount, bench.seconds, rw="randread", bs="4k", size=bench.size_bytes,
        filename="large", direct=1, numjobs=8,
    )  # fmt: skip
    spent = cpu.spent() | {"app": figure.cpu_s}
    yield Row(
        "FUSE random read 4 KiB direct, 8 jobs", figure.iops, "/s", 1.0, 19_700, PEER,
        "GlusterFS, 3 copies", cpu_of(spent, figure.ios / 1000), "1000",
    )  # fmt: skip


def fuse_readers(bench: Bench) -> Iterator[Row]:
    part = bench.size_bytes // 4
    cpu = Cpu(bench.cluster)
    figure = fiorun.one_job(
        bench.cluster.mount, bench.seconds, rw="read", bs="1m", size=part, filename="large",
        direct=1, numjobs=4, offset_increment=part,
    )  # fmt: skip
    spent = cpu.spent() | {"app": figure.cpu_s}
    yield Row(
        "FUSE 4 readers 1 MiB direct", figure.bytes_per_s / MB, "MB/s", 1.0, 2000, PEER,
        "JuiceFS, 1 copy", cpu_of(spent, figure.io_bytes / GB), "GB",
    )  # fmt: skip


def fuse_random_write(bench: Bench) -> Iterator[Row]:
    """Also what reaches the disk for it, with all that the file system and meta write meanwhile."""
    before, idle = quiet(bench.cluster)
    cpu = Cpu(bench.cluster)
    figure = fiorun.one_job(
        bench.cluster.mount, bench.seconds, rw="randwrite", bs="4k", size=bench.written_bytes,
        filename="written", fsync=32, overwrite=1,
    )  # fmt: skip
    spent = cpu.spent() | {"app": figure.cpu_s}
    yield Row(
        "FUSE random write 4 KiB, fsync=32, 3 copies", figure.iops, "/s", 2.0, 5100, PEER,
        "MooseFS", cpu_of(spent, figure.ios / 1000), "1000",
    )  # fmt: skip
    after, _ = quiet(bench.cluster)
    copies = figure.io_bytes * bench.cluster.plan.replicas
    handed = (after.handed - before.handed) / copies
    said = f"{handed:.2f} handed to the kernel by storage"
    physical = handed
    if after.device is not None and before.device is not None:
        physical = (after.device - before.device) / copies
        said = f"to the block device, by anybody (idle: {idle / MB:.1f} MB/s); {said}"
    yield Row(
        "the same: bytes to disk per byte, per replica", physical, "B/B", 3.0, said=said,
        at_most=True,
    )  # fmt: skip


def quiet(cluster: LocalCluster) -> tuple[Written, float]:
    """What has been written once the storage services write no more, or after a while.

    Also what the device is written per second then: others', if it is not next to nothing.
    """
    found, idle = written(cluster), 0.0
    for _ in range(int(QUIET_S_MAX / QUIET_S)):
        began = time.perf_counter()
        time.sleep(QUIET_S)
        before, found = found, written(cluster)
        idle = ((found.device or 0) - (before.device or 0)) / (time.perf_counter() - began)
        if found.handed - before.handed < QUIET_BYTES:
            break
    return found, idle


# ---------------------------------------------------------------- names


BLOCK = os.urandom(4 * KiB)
NAMES = {  # step: (its row, the peer's figure, whose it is, goal)
    Step("create", lambda d, n: (d / f"f{n}").write_bytes(BLOCK)):
        ("create + write 4 KiB + close", 1100, "CephFS, MooseFS", 2.0),
    Step("stat", lambda d, n: os.stat(d / f"f{n}"), pause_s=EXPIRE_S):
        ("stat, nothing of it cached", 17_600, "MooseFS", 1.0),
    Step("rename", lambda d, n: os.rename(d / f"f{n}", d / f"g{n}")):
        ("rename", 6300, "MooseFS", 1.0),
    Step("unlink", lambda d, n: os.unlink(d / f"g{n}")):
        ("unlink", 8500, "MooseFS", 1.0),
}  # fmt: skip


def names(bench: Bench) -> Iterator[Row]:
    files = max(int(150 * bench.seconds), 5)
    cpu, said = Cpu(bench.cluster), iter(NAMES.values())
    where = bench.cluster.mount / "names"
    for _, rate, us in rates(where, PROCESSES, files, cpu.now, tuple(NAMES)):
        what, limit, peer, goal = next(said)
        yield Row(
            f"FUSE {what}, {PROCESSES} processes", rate, "/s", goal, limit, PEER, peer,
            {group: used / 1000 for group, used in us.items()}, "1000",
        )  # fmt: skip


# ---------------------------------------------------------------- the whole


def resume(bench: Bench) -> Iterator[Row]:
    """The last, since a replica is missing afterwards."""
    found = outage(bench.cluster, "storage1", bench.cluster.mount / "bench", bench.seconds)
    for what, waited_s, goal_s in (
        ("longest write, a replica killed", found.write_s, 6.0),
        ("longest read, a replica killed", found.read_s, 0.5),
    ):
        yield Row(what, waited_s, "s", goal_s, said="kill -9 of a storage service", at_most=True)


def started(cluster: LocalCluster, took_s: float) -> list[Row]:
    return [
        Row("start: one command to a mounted cluster", took_s, "s", 5.0, at_most=True,
            said="installed"),
        Row("memory of all processes after it", sum(memory_mib(cluster).values()), "MiB", 600.0,
            at_most=True, said="sum of what is resident"),
    ]  # fmt: skip


ROWS: tuple[Callable[[Bench], Iterator[Row]], ...] = (
    native_read_large,
    native_read_small,
    native_read_tcp,
    fuse_read,
    native_write,
    fuse_write,
    fuse_random_read,
    fuse_readers,
    fuse_random_write,
    names,
)


@contextmanager
def laid_out(cluster: LocalCluster, seconds: float, size_bytes: int) -> Iterator[Bench]:
    """The files that the rows read, on everything that they are read from."""
    local = cluster.root / "local"
    local.mkdir()
    with ExitStack() as stack:
        through = stack.enter_context(compared(local))
        daemon = stack.enter_context(Connection(cluster.mount))
        bench = Bench(cluster, daemon, local, through, seconds, size_bytes)
        for place in (cluster.mount, local):
            lay_out(place / "bench", bench.file_bytes)
        for place in (cluster.mount, through):
            if place is not None:
                lay_out(place / "large", bench.size_bytes)
        lay_out(cluster.mount / "written", bench.written_bytes)
        wait_idle(cluster)
        yield bench


@contextmanager
def compared(local: Path) -> Iterator[Path | None]:
    """The C passthrough, or None and why there is none."""
    with ExitStack() as stack:
        try:
            found: Path | None = stack.enter_context(passthrough(local, "auto"))
        except (AssertionError, OSError) as problem:
            print(f"no limit for FUSE reads, libfuse's example does not work here: {problem}")
            found = None
        yield found


def attempt(measured: Callable[[Bench], Iterator[Row]], bench: Bench, found: list[Row]) -> bool:
    """Add the rows of one measurement; a failure is told, and does not end the others."""
    try:
        for row in measured(bench):
            found.append(row)
            print(f"  {row.name}: {rows.number(row.figure)} {row.unit}", flush=True)
    except FAILURES as problem:
        print(f"  {measured.__name__} failed: {problem!r}", flush=True)
        return False
    return True


def measure(cluster: LocalCluster, options: argparse.Namespace) -> dict[str, object]:
    """Start the cluster, print the table, and return all of it as data."""
    began = time.perf_counter()
    cluster.up()
    start = started(cluster, time.perf_counter() - began)
    found: list[Row] = []
    with laid_out(cluster, options.seconds, options.size_mib * MiB) as bench:
        failed = [measured.__name__ for measured in ROWS if not attempt(measured, bench, found)]
        drawn: dict[str, object] = {}
        if options.plots is not None:
            drawn = curves.draw_all(
                cluster, bench.daemon, min(options.seconds, 1.5), bench.file_bytes, options.plots
            )
        failed += [resume.__name__] * (not attempt(resume, bench, found))
    found += start
    print("\n" + rows.table(found))
    return {
        "machine": rows.machine(),
        "seconds": options.seconds,
        "size_mib": options.size_mib,
        "rows": [row.data() for row in found],
        "failed": failed,
        "curves": drawn,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--size-mib", type=int, default=512, help="of the large file, >= 32")
    parser.add_argument("--json", type=Path, help="write the rows as data into this file")
    parser.add_argument("--plots", type=Path, help="draw the curves into this directory")
    options = parser.parse_args()
    if options.size_mib < 32 or options.seconds <= 0:
        parser.error("--size-mib is at least 32, --seconds above 0")
    began = time.perf_counter()
    with local_cluster() as cluster:
        found = measure(cluster, options)
    print(f"{time.perf_counter() - began:.0f} s in all, on {os.cpu_count()} CPUs")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if found["failed"]:
        sys.exit(f"not measured: {found['failed']}")


if __name__ == "__main__":
    main()
