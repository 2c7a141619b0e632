"""What fio measures through the mount, beside its limits in the same run, and whose CPU it takes.

usage: bench_fio.py [--seconds 4] [--only NAME,NAME] [--plots DIRECTORY]

Every job file of deploy/fio runs on three directories, one after another: emberfs (3 replicas, all
of it on this host), a plain directory of the local file system, and libfuse's C passthrough over
such a directory, which shows what FUSE alone costs. Ratios are to these. CPU is what each emberfs
process took, user + system: microseconds per request, and seconds per 10^9 bytes.

With --plots, throughput against block size and against depth is drawn (PNG, needs matplotlib).
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import measure
from bench_metadata import passthrough
from fiorun import Figure, FioError, job_file
from pictures import Panel
from pictures import draw as draw_panels

from emberfs.proto.ids import KiB, MiB
from integration.harness import LocalCluster, local_cluster, run

JOB_FILES = Path(__file__).resolve().parent.parent / "deploy" / "fio"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
LARGE_BYTES = 512 * MiB  # fio-large: what the reading jobs read
WRITTEN_BYTES = 128 * MiB  # fio-written
READING = ("seq-read", "rand-read", "readers")  # on what nobody is writing to
SWEEP = "sweep"
SETTLE_S = 5  # after laying out: the scrubber and what was buffered take CPU
BLOCKS_BYTES = tuple(4 * KiB << n for n in range(0, 11, 2))  # 4 KiB to 4 MiB
DEPTHS = (1, 2, 4, 8, 16, 32, 64)


def cpu_s(cluster: LocalCluster) -> dict[str, tuple[float, float]]:
    """CPU seconds, user and system, of every emberfs process so far."""
    found = {}
    for name in [*cluster.plan.service_names(), "fuse"]:
        fields = Path(f"/proc/{cluster.pid(name)}/stat").read_text().rpartition(")")[2].split()
        found[name] = (int(fields[11]) / TICKS_PER_S, int(fields[12]) / TICKS_PER_S)
    return found


def lay_out(directory: Path) -> None:
    """What the jobs read, so that they do not write it themselves within the measured time."""
    measure.lay_out(directory / "fio-large", LARGE_BYTES)
    measure.lay_out(directory / "fio-written", WRITTEN_BYTES)


class Place(NamedTuple):
    """Where jobs run."""

    name: str
    directory: Path


@contextmanager
def places(cluster: LocalCluster) -> Iterator[list[Place]]:
    """The mount and what it is compared with, all laid out."""
    local = cluster.root / "local"
    local.mkdir()
    with passthrough(local, "auto") as through:
        # The example passes absolute paths on: what it mounts is the whole tree below its source.
        found = [Place("emberfs", cluster.mount), Place("local", local), Place("C FUSE", through)]
        for place in found:
            lay_out(place.directory)
        time.sleep(SETTLE_S)
        yield found


def shown(figure: Figure | None, by_bytes: bool) -> str:
    if figure is None:
        return "-"
    return f"{figure.bytes_per_s / 1e6:.0f}" if by_bytes else f"{figure.iops:.0f}"


def ratio(figure: Figure, limit: Figure | None, by_bytes: bool) -> str:
    if limit is None:
        return "-"
    return f"{figure.bytes_per_s / limit.bytes_per_s if by_bytes else figure.iops / limit.iops:.3f}"


def show(name: str, figures: dict[str, dict[str, Figure]], used: dict[str, float]) -> None:
    """Print the lines of one job file."""
    ours = figures["emberfs"]
    ios = sum(figure.ios for figure in ours.values())
    total_gb = sum(figure.io_bytes for figure in ours.values()) / 1e9
    for row, figure in ours.items():
        by_bytes = figure.io_bytes / figure.ios >= 256 * KiB
        local, through = (figures[other].get(row) for other in ("local", "C FUSE"))
        print(
            f"{row:20}{shown(figure, by_bytes):>8} {'MB/s' if by_bytes else '/s':5}"
            f"{shown(local, by_bytes):>8}{ratio(figure, local, by_bytes):>8}"
            f"{shown(through, by_bytes):>9}{ratio(figure, through, by_bytes):>8}"
            f"{figure.p99_us / 1000:>10.2f}"
        )
    for unit, per in (("us per request", ios / 1e6), ("s per GB", total_gb)):
        parts = [f"{process} {seconds / per:.2f}" for process, seconds in used.items()]
        print(f"    CPU, {unit}: all {sum(used.values()) / per:.2f}; " + ", ".join(parts))
    sys.stdout.flush()


def run_job(cluster: LocalCluster, where: list[Place], name: str, seconds: int) -> None:
    """One job file on all places."""
    figures: dict[str, dict[str, Figure]] = {}
    used: dict[str, float] = {}
    for place in where:
        path = JOB_FILES / f"{name}.fio"
        if "unlink=1" not in path.read_text():  # else it begins without its file
            with suppress(FioError):
                job_file(path, place.directory, seconds, only_files=True)
        before = cpu_s(cluster)
        try:
            figures[place.name] = job_file(path, place.directory, seconds)
        except FioError as problem:
            print(f"    {place.name}: {problem}")
            figures[place.name] = {}
        if place.name == "emberfs":
            after = cpu_s(cluster)
            used = {key: sum(after[key]) - sum(before[key]) for key in before}
    show(name, figures, used)


def curves(
    where: list[Place], seconds: int, points: list[tuple[int, int]]
) -> dict[str, list[Figure | None]]:
    """Figures of random reads and writes at (block bytes, depth), by "PLACE read"."""
    found: dict[str, list[Figure | None]] = {}
    for place in where:
        for pattern in ("randread", "randwrite"):
            side = pattern.removeprefix("rand")
            row = found[f"{place.name} {side}"] = []
            for block_bytes, depth in points:
                try:
                    made = job_file(
                        JOB_FILES / f"{SWEEP}.fio", place.directory, seconds,
                        RW=pattern, BS=block_bytes, DEPTH=depth,
                    )  # fmt: skip
                    row.append(made[f"{SWEEP} {side}"])
                except FioError as problem:
                    print(f"    {place.name}: {problem}")
                    row += [None] * (len(points) - len(row))
                    break
    return {row: made for row, made in found.items() if any(made)}


def draw(where: list[Place], seconds: int, target: Path) -> None:
    """Throughput against block size at depth 8, and requests per second against depth at 4 KiB."""
    for file_name, title, label, values, points, by_bytes in (
        ("fio_block_size.png", "random, O_DIRECT, libaio, depth 8", "block size, KiB",
         [size // KiB for size in BLOCKS_BYTES], [(size, 8) for size in BLOCKS_BYTES], True),
        ("fio_depth.png", "4 KiB random, O_DIRECT, libaio", "requests in flight",
         list(DEPTHS), [(4 * KiB, depth) for depth in DEPTHS], False),
    ):  # fmt: skip
        lines = {}
        for row, found in curves(where, seconds, points).items():
            lines[row] = heights = [
                None if f is None else (f.bytes_per_s / 1e6 if by_bytes else f.iops) for f in found
            ]
            told = ", ".join("-" if height is None else f"{height:.0f}" for height in heights)
            print(f"{file_name}: {row}: {told}", flush=True)
        y_label = "MB/s" if by_bytes else "requests per second"
        draw_panels([Panel(title, label, y_label, values, lines)], target / file_name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = {path.stem for path in JOB_FILES.glob("*.fio")} - {SWEEP, *READING}
    names = [*READING, *sorted(found)]
    parser.add_argument("--seconds", type=int, default=4, help="of each job that has a runtime")
    parser.add_argument("--only", default=",".join(names), help="names of job files")
    parser.add_argument("--plots", type=Path, help="draw the curves into this directory")
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    if unknown := set(wanted).difference(names):
        parser.error(f"no job file {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    print(run("fio", "--version").stdout.strip(), "on", os.cpu_count(), "CPUs, 3 replicas")
    with local_cluster() as cluster:
        cluster.up()
        with places(cluster) as where:
            print(f"{'':20}{'emberfs':>13} {'local':>8}{'ratio':>8}{'C FUSE':>9}{'ratio':>8}"
                  f"{'p99, ms':>10}")  # fmt: skip
            for name in wanted:
                run_job(cluster, where, name, options.seconds)
            if options.plots is not None:
                draw(where, options.seconds, options.plots)


if __name__ == "__main__":
    main()
