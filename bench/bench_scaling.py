"""How reads scale: with storage services, client processes, targets, files, and file size.

usage: bench_scaling.py [--seconds 2] [--json FILE] [--plots DIRECTORY] [--only NAME,NAME] [--large]

Everything shares this host, so lines go up until its cores are busy: `cores` says how many CPU
seconds per second all processes took, and the CPU per read what would be left to other hosts.

  clients   1 to 8 reading processes, 4 KiB and 1 MiB: through rings of one daemon (`rings`), and
            each with a library of its own and no daemon (`library`)
  storages  1, 2, 4 storage services, one copy of the data, 4 library clients
  targets   1 to 16 targets on each of 3 storage services, one copy, 4 library clients
  files     open + read + close of some of 10^3 to 10^5 (--large: 10^6) files of 1 KiB
  sparse    4 KiB anywhere in a file of 1 MiB to 100 GiB that is all hole but for 64 blocks
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from bench_cluster import native_reads
from bench_ring import read_loop
from measure import Cpu, Pace, lay_out, named, wait_idle
from pictures import Panel, draw
from rows import machine, number, plain

from emberfs.client.blocking import Client
from emberfs.client.native.connection import Connection
from emberfs.client.native.layout import READ
from emberfs.client.native.ring import Ring
from emberfs.deploy.plan import Plan, write_plan
from emberfs.proto.ids import GiB, KiB, MiB
from integration.harness import LocalCluster, local_cluster

FORK = get_context("fork")
CLIENTS = (1, 2, 4, 8)
STORAGES = (1, 2, 4)
TARGETS = (1, 2, 4, 8, 16)
FILES = (1000, 10_000, 100_000)
FILES_LARGE = (*FILES, 1_000_000)
SPARSE_BYTES = (MiB, 32 * MiB, GiB, 32 * GiB, 100 * GiB)
CLIENTS_OF_AXIS = 4
BLOCKS = ((4 * KiB, 64), (MiB, 8))  # (block, batch)
PAGE_FILES = 1000
SPARSE_BLOCKS = 64
CONTENT = os.urandom(KiB)
ANSWER_S = 120
SAMPLE_FILES = 1000  # what is read, of however many files


class Options(NamedTuple):
    """How much is done."""

    seconds: float
    file_bytes: int
    clients: tuple[int, ...] = CLIENTS
    storages: tuple[int, ...] = STORAGES
    targets: tuple[int, ...] = TARGETS
    files: tuple[int, ...] = FILES
    sparse_bytes: tuple[int, ...] = SPARSE_BYTES


class Point(NamedTuple):
    """One figure: reads per second of `line` at `x`, and what they cost."""

    axis: str
    line: str
    x: int
    per_s: float
    block: int
    cpu_us: dict[str, float]  # per read, by group
    cores: float  # CPU seconds per second of all of them


def point(
    axis: str, line: str, x: int, pace: Pace, block: int, spent: dict[str, float], took_s: float
) -> Point:
    """Also tells it at once. `took_s` is how long `spent` was counted."""
    cpu_us = {group: used * 1e6 / pace.count for group, used in spent.items()}
    made = Point(axis, line, x, pace.per_s, block, cpu_us, sum(spent.values()) / took_s)
    print(f"  {axis} {x}, {line}: {number(pace.per_s)}/s", flush=True)
    return made


# ---------------------------------------------------------------- clusters


@contextmanager
def cluster_of(options: Options, **changed: Any) -> Iterator[LocalCluster]:  # noqa: ANN401
    """A started cluster with `bench` on it; `changed` are fields of its plan."""
    with local_cluster() as cluster:
        plan = Plan(
            directory=str(cluster.directory), mountpoint=str(cluster.mount),
            base_port=cluster.base_port, **changed,
        )  # fmt: skip
        write_plan(plan)
        cluster.up()
        lay_out(cluster.mount / "bench", options.file_bytes)
        wait_idle(cluster)
        yield cluster


# ---------------------------------------------------------------- many clients


Reader = Callable[[LocalCluster, int, int, Options], Pace]


def by_ring(cluster: LocalCluster, block: int, batch: int, options: Options) -> Pace:
    """Two batches under way through the daemon of the mount."""
    with Connection(cluster.mount) as daemon:
        pace, _ = read_loop(
            cluster, daemon, cluster.mount / "bench", block, 2 * batch, options.seconds,
            options.file_bytes, warm_s=0.0,  # the CPU is counted outside
        )  # fmt: skip
    return pace


def by_library(cluster: LocalCluster, block: int, batch: int, options: Options) -> Pace:
    """The same by a client of its own."""
    return uvloop.run(
        native_reads(
            cluster, transport="shm", block=block, batch=batch, seconds=options.seconds,
            file_bytes=options.file_bytes,
        )
    )  # fmt: skip


def crowd(
    cluster: LocalCluster, clients: int, reader: Reader, block: int, batch: int, options: Options
) -> tuple[Pace, dict[str, float], float]:
    """So many processes read at the same time: all their reads, CPU by group, seconds of both."""
    ready = FORK.Barrier(clients + 1)
    pipes, processes = [], []
    for _ in range(clients):
        ours, theirs = FORK.Pipe(duplex=False)
        work = (cluster, reader, block, batch, options, theirs, ready)
        processes.append(FORK.Process(target=one_client, args=work, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        ready.wait(ANSWER_S)
        cpu, began = Cpu(cluster), time.perf_counter()
        paces = [answer(pipe) for pipe in pipes]
        spent, took_s = cpu.spent(), time.perf_counter() - began
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    per_s = sum(pace.per_s for pace in paces)
    count = sum(pace.count for pace in paces)
    return Pace(count, count / per_s), spent, took_s


def answer(pipe: Pipe) -> Pace:
    """What a client did. Raises RuntimeError with what it says if it could not."""
    if not pipe.poll(ANSWER_S):
        raise RuntimeError("a client does not answer")
    try:
        found = pipe.recv()
    except EOFError:
        raise RuntimeError("a client has died") from None
    if isinstance(found, str):
        raise RuntimeError(found)
    return Pace(*found)


def one_client(
    cluster: LocalCluster, reader: Reader, block: int, batch: int, options: Options, pipe: Pipe,
    ready: Barrier,
) -> None:  # fmt: skip
    """In a process of its own."""
    ready.wait(ANSWER_S)
    try:
        pipe.send(tuple(reader(cluster, block, batch, options)))
    except Exception as problem:
        pipe.send(f"a client: {problem!r}")


def reads(
    cluster: LocalCluster, axis: str, x: int, clients: int, way: str, options: Options
) -> Iterator[Point]:
    """Both block sizes."""
    reader = {"rings": by_ring, "library": by_library}[way]
    for block, batch in BLOCKS:
        found = crowd(cluster, clients, reader, block, batch, options)
        pace, spent, took_s = found
        yield point(axis, f"{way}, {named(block)}", x, pace, block, spent, took_s)


def over_clients(cluster: LocalCluster, options: Options) -> Iterator[Point]:
    for clients in options.clients:
        for way in ("rings", "library"):
            yield from reads(cluster, "clients", clients, clients, way, options)


def over_storages(options: Options) -> Iterator[Point]:
    for storages in options.storages:
        with cluster_of(options, storages=storages, replicas=1) as cluster:
            yield from reads(cluster, "storages", storages, CLIENTS_OF_AXIS, "library", options)


def over_targets(options: Options) -> Iterator[Point]:
    for targets in options.targets:
        with cluster_of(options, replicas=1, targets_per_storage=targets) as cluster:
            yield from reads(cluster, "targets", targets, CLIENTS_OF_AXIS, "library", options)


# ---------------------------------------------------------------- many files


def over_files(cluster: LocalCluster, options: Options) -> Iterator[Point]:
    with Client(cluster.plan.mgmtd_address, cluster=cluster.plan.cluster) as client:
        client.mkdir("/many")
        made = 0
        for files in options.files:
            make_files(client, range(made, files))
            made = files
            wait_idle(cluster)

            def by_mount(n: int) -> bytes:
                return (cluster.mount / "many" / str(n)).read_bytes()

            def by_client(n: int) -> bytes:
                with client.open(f"/many/{n}") as file:
                    return file.read()

            yield opened_and_read(cluster, files, "library", options, by_client)
            yield opened_and_read(cluster, files, "mount", options, by_mount)


def make_files(client: Client, numbers: range) -> None:
    for first in range(0, len(numbers), PAGE_FILES):
        page = [(f"/many/{n}", CONTENT) for n in numbers[first : first + PAGE_FILES]]
        if problems := [problem for problem in client.batch_create(page) if problem]:
            raise problems[0]


def opened_and_read(
    cluster: LocalCluster, files: int, way: str, options: Options, read: Callable[[int], bytes]
) -> Point:
    """Some of the files, spread over all, again and again.

    As many whatever their number is: what caches hold of them must not make the difference.
    """
    sample = range(0, files, max(files // SAMPLE_FILES, 1))
    pick = random.Random(files).choice

    def some(seconds: float) -> Pace:
        began, count = time.perf_counter(), 0
        while not count or time.perf_counter() - began < seconds:
            if read(pick(sample)) != CONTENT:
                raise OSError("a file has not what was written")
            count += 1
        return Pace(count, time.perf_counter() - began)

    some(options.seconds / 10)
    cpu, began = Cpu(cluster), time.perf_counter()
    pace = some(options.seconds)
    took_s = time.perf_counter() - began
    return point("files", f"{way}, open + read + close", files, pace, KiB, cpu.spent(), took_s)


# ---------------------------------------------------------------- one large file


def over_sparse(cluster: LocalCluster, options: Options) -> Iterator[Point]:
    with Connection(cluster.mount) as daemon:
        for size in options.sparse_bytes:
            path = cluster.mount / f"sparse{size}"
            filled = sparse_file(path, size)
            holes = random.Random(size + 1)
            anywhere = [holes.randrange(size // (4 * KiB)) * 4 * KiB for _ in range(4096)]
            for line, offsets in (("data", filled), ("anywhere", anywhere)):
                cpu, began = Cpu(cluster), time.perf_counter()
                pace = offsets_read(daemon, path, offsets, options.seconds)
                took_s = time.perf_counter() - began
                yield point("sparse", f"rings, {line}", size, pace, 4 * KiB, cpu.spent(), took_s)
            path.unlink()


def sparse_file(path: Path, size: int) -> list[int]:
    """Make it with some blocks in it; where they are."""
    pick = random.Random(size)
    filled = sorted({pick.randrange(size // (4 * KiB)) * 4 * KiB for _ in range(SPARSE_BLOCKS)})
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, size)
        for offset in filled:
            os.pwrite(fd, os.urandom(4 * KiB), offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    return filled


def offsets_read(daemon: Connection, path: Path, offsets: list[int], seconds: float) -> Pace:
    """Batches of 64 blocks of 4 KiB, one after another."""
    block, batch = 4 * KiB, 64
    region = daemon.region(batch * block)
    sinks = [region.slice(n * block, block) for n in range(batch)]
    with path.open("rb") as opened, daemon.file(opened) as file, Ring(daemon, batch) as ring:
        began, count = time.perf_counter(), 0
        while not count or time.perf_counter() - began < seconds:
            wanted = [
                (file, offsets[(count + n) % len(offsets)], sink) for n, sink in enumerate(sinks)
            ]
            if (results := ring.wait(ring.submit(READ, wanted))) != [block] * batch:
                raise OSError(f"short or failed reads: {results}")
            count += batch
        took_s = time.perf_counter() - began
    region.close()
    return Pace(count, took_s)


# ---------------------------------------------------------------- the whole


OWN_CLUSTERS: dict[str, Callable[[Options], Iterator[Point]]] = {
    "storages": over_storages,
    "targets": over_targets,
}
ONE_CLUSTER: dict[str, Callable[[LocalCluster, Options], Iterator[Point]]] = {
    "clients": over_clients,
    "sparse": over_sparse,
    "files": over_files,  # last: what it makes stays
}
AXES = (*OWN_CLUSTERS, *ONE_CLUSTER)
TITLES = {
    "clients": "client processes, 3 storage services",
    "storages": "storage services, 1 copy, 4 clients",
    "targets": "targets per storage service, 1 copy, 4 clients",
    "files": "files in one directory, 1 client",
    "sparse": "size of a sparse file, 1 client",
}


def shown_x(axis: str, x: int) -> str:
    if axis != "sparse":
        return f"{x:,}"
    return f"{x // GiB} GiB" if x >= GiB else named(x)


def table(points: list[Point]) -> str:
    """All points in columns; `first` is the ratio to the first value of the same line."""
    groups = ("app", "daemon", "storage", "meta")
    lines = [["", "", "reads/s", "MB/s", "first", "cores", *groups]]
    first: dict[tuple[str, str], float] = {}
    for p in points:
        base = first.setdefault((p.axis, p.line), p.per_s)
        lines.append([
            f"{p.axis} {shown_x(p.axis, p.x)}", p.line, number(p.per_s),
            number(p.per_s * p.block / 1e6), f"{p.per_s / base:.2f}", f"{p.cores:.2f}",
            *(f"{p.cpu_us[group]:.1f}" for group in groups),
        ])  # fmt: skip
    return plain(lines) + "\nCPU: microseconds per read; `first`: to the first of its line."


def picture(points: list[Point], path: Path) -> None:
    """A panel for each axis, its lines relative to their first points."""
    panels = []
    for axis in dict.fromkeys(p.axis for p in points):
        mine = [p for p in points if p.axis == axis]
        xs = list(dict.fromkeys(p.x for p in mine))
        lines: dict[str, list[float | None]] = {}
        for line in dict.fromkeys(p.line for p in mine):
            found = {p.x: p.per_s for p in mine if p.line == line}
            base = found[min(found)]
            lines[f"{line}: 1 is {number(base)}/s"] = [
                found[x] / base if x in found else None for x in xs
            ]
        names = [shown_x(axis, x) for x in xs]
        panels.append(
            Panel(TITLES[axis], axis, "reads/s, to the first", xs, lines, names, "linear")
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(panels, path, columns=2)


def measure(options: Options, axes: set[str]) -> list[Point]:
    """One axis after another."""
    found: list[Point] = []
    for axis, over in OWN_CLUSTERS.items():
        if axis in axes:
            found += over(options)
    if not axes.isdisjoint(ONE_CLUSTER):
        with cluster_of(options) as cluster:
            for name, on in ONE_CLUSTER.items():
                if name in axes:
                    found += on(cluster, options)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each point")
    parser.add_argument("--size-mib", type=int, default=64, help="of the file that is read")
    parser.add_argument("--only", default=",".join(AXES), help="which axes, by name")
    parser.add_argument("--points", type=int, default=99, help="at most so many values of an axis")
    parser.add_argument("--large", action="store_true", help="also 10^6 files")
    parser.add_argument("--json", type=Path, help="write the points as data into this file")
    parser.add_argument("--plots", type=Path, help="draw bench_scaling.png into this directory")
    given = parser.parse_args()
    wanted = {axis for axis in given.only.split(",") if axis}
    if unknown := wanted.difference(AXES):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(AXES)}")
    few, all_files = slice(given.points), FILES_LARGE if given.large else FILES
    options = Options(
        given.seconds, given.size_mib * MiB, CLIENTS[few], STORAGES[few], TARGETS[few],
        all_files[few], SPARSE_BYTES[few],
    )  # fmt: skip
    began = time.perf_counter()
    points = measure(options, wanted)
    print("\n" + table(points))
    print(f"{time.perf_counter() - began:.0f} s in all, on {os.cpu_count()} CPUs")
    if given.json is not None:
        data = {"machine": machine(), "points": [p._asdict() for p in points]}
        given.json.write_text(json.dumps(data, indent=1) + "\n")
    if given.plots is not None:
        picture(points, given.plots / "bench_scaling.png")


if __name__ == "__main__":
    main()
