"""Small files on a real mount: with their content beside the inode, and with a chunk for each.

Both kinds are made in turns of the same run, meta being started anew with the other setting, so
that whatever else the machine does meets both. Prints medians of the turns, by one process: files
per second with chunks and inline, and what that costs: milliseconds of processor of all services
and the mount per file, which hang less on what else the machine does. `close` is durable.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from emberfs.deploy import processes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from integration.harness import LocalCluster, local_cluster

TURNS = 2
FILES = 60
INLINE_BYTES = 8192
SIZES = (1024, 4096, 16_384)
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Figure(NamedTuple):
    """What was measured."""

    per_s: float
    cpu_ms: float


def set_limit(cluster: LocalCluster, limit: int) -> None:
    """Start meta anew with another limit of inline files."""
    config = cluster.plan.process("meta").config
    lines = [x for x in config.read_text().splitlines() if not x.startswith("inline_bytes_max")]
    config.write_text("\n".join([f"inline_bytes_max = {limit}", *lines]) + "\n")
    cluster.kill("meta")
    cluster.start("meta")
    os.listdir(cluster.mount)  # waits until it answers


def cpu_s(cluster: LocalCluster) -> float:
    """Return the processor time that the cluster's processes have used."""
    total = 0
    for config in (cluster.directory / "config").glob("*.toml"):
        process = cluster.plan.process(config.stem)
        pid = processes.running_pid(process)
        if pid is not None:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total * TICK_S


def rate(cluster: LocalCluster, paths: list[Path], work: Callable[[Path], object]) -> Figure:
    """Do `work` to every path."""
    used, began = cpu_s(cluster), time.perf_counter()
    for path in paths:
        work(path)
    took = time.perf_counter() - began
    return Figure(len(paths) / took, (cpu_s(cluster) - used) * 1000 / len(paths))


def turn(cluster: LocalCluster, directory: Path) -> dict[str, Figure]:
    """Make, read and remove files of each size."""
    directory.mkdir()
    found = {}
    for size in SIZES:
        found |= files_of(cluster, directory, size)
    return found


def files_of(cluster: LocalCluster, directory: Path, size: int) -> dict[str, Figure]:
    """The same for one size."""
    data, what = os.urandom(size), f"{size // 1024} KiB"
    paths = [directory / f"{size}.{number}" for number in range(FILES)]

    def write(path: Path) -> None:
        path.write_bytes(data)

    made = rate(cluster, paths, write)
    for path in paths:
        drop(path)
    read = rate(cluster, paths, Path.read_bytes)
    again = rate(cluster, paths, write)
    assert all(path.read_bytes() == data for path in paths)
    gone = rate(cluster, paths, Path.unlink)
    return {
        f"create + write {what} + close": made,
        f"open + read {what} + close": read,
        f"rewrite {what} + close": again,
        f"unlink {what}": gone,
    }


def drop(path: Path) -> None:
    """Take the pages of a file from the kernel's cache."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def main() -> None:
    with local_cluster() as cluster:
        cluster.up()
        found: dict[int, list[dict[str, Figure]]] = {0: [], INLINE_BYTES: []}
        for number in range(2 * TURNS):
            limit = (0, INLINE_BYTES)[number % 2]
            set_limit(cluster, limit)
            found[limit].append(turn(cluster, cluster.mount / f"turn{number}"))
        print(f"{'':28} {'chunks':>8} {'inline':>8} {'ratio':>5}   CPU per file")
        for what in found[0][0]:
            old, new = (median([turn[what] for turn in turns]) for turns in found.values())
            speed = f"{old.per_s:6.0f}/s {new.per_s:6.0f}/s {new.per_s / old.per_s:5.1f}"
            cost = f"{old.cpu_ms:5.1f} ms {new.cpu_ms:5.1f} ms {old.cpu_ms / new.cpu_ms:5.1f}"
            print(f"{what:28} {speed}   {cost}", flush=True)


def median(figures: list[Figure]) -> Figure:
    """Each of the two by itself."""
    return Figure(*(statistics.median(values) for values in zip(*figures, strict=True)))


if __name__ == "__main__":
    main()
