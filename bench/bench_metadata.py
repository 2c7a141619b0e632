"""What a metadata call costs through the mount: rates, ratios, and whose CPU it takes.

usage: bench_metadata.py [FILES per process, 400] [NAMES of the big directory, 100000]

Every line names one step, with 1 and 4 processes, on three directories: emberfs (3 replicas), a
plain directory of the local file system, and libfuse's own C passthrough over such a directory,
which shows what FUSE alone costs. `round trip` is a stat through the passthrough with all caching
off: one request to user space and its answer.

CPU is what each emberfs process took meanwhile, in microseconds per operation, user + system. User
time is Python and the little C below it (RocksDB, msgspec, uvloop); system time is the kernel's:
FUSE, sockets, the disk.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

from measure import memory_mib

from emberfs.client.blocking import Client
from integration.harness import LocalCluster, local_cluster, run, wait_until

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
EXAMPLE = Path("/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")
SMALL = os.urandom(1024)
STEP_TIMEOUT_S = 300
PAGE_NAMES = 5000
FORK = get_context("fork")


class Step(NamedTuple):
    """One operation on file number n of a directory."""

    name: str
    work: Callable[[Path, int], object]
    pause_s: float = 0.0  # before it, so that what the kernel caches has run out
    once: bool = False  # one operation on the whole directory; its rate counts the files


def create(directory: Path, n: int) -> None:
    os.close(os.open(directory / f"e{n}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def create_small(directory: Path, n: int) -> None:
    (directory / f"f{n}").write_bytes(SMALL)


def open_read(directory: Path, n: int) -> None:
    assert len((directory / f"f{n}").read_bytes()) == len(SMALL)


STEPS = (
    Step("create", create),
    Step("create + 1 KiB + close", create_small),
    Step("stat, cold", lambda d, n: os.stat(d / f"f{n}"), pause_s=1.3),
    Step("stat, warm", lambda d, n: os.stat(d / f"f{n}")),
    Step("open + read 1 KiB", open_read, pause_s=1.3),
    Step("readdir with attributes", lambda d, _: sum(e.stat().st_size for e in os.scandir(d)),
         pause_s=1.3, once=True),
    Step("rename", lambda d, n: os.rename(d / f"f{n}", d / f"g{n}")),
    Step("unlink", lambda d, n: os.unlink(d / f"g{n}")),
    Step("rm -rf", lambda d, _: shutil.rmtree(d), once=True),
)  # fmt: skip


def worker(
    directory: Path, files: int, steps: tuple[Step, ...], start: Barrier, done: Barrier
) -> None:
    """Perform every step when told to; all processes begin each together."""
    directory.mkdir()
    for step in steps:
        start.wait(STEP_TIMEOUT_S)
        for n in range(1 if step.once else files):
            step.work(directory, n)
        done.wait(STEP_TIMEOUT_S)


def rates(
    root: Path,
    processes: int,
    files: int,
    around: Callable[[], dict[str, float]] | None = None,
    steps: tuple[Step, ...] = STEPS,
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Yield (step, operations per second of all processes, CPU us per operation by process)."""
    root.mkdir()
    start, done = FORK.Barrier(processes + 1), FORK.Barrier(processes + 1)
    crowd = [
        FORK.Process(target=worker, args=(root / f"p{i}", files, steps, start, done), daemon=True)
        for i in range(processes)
    ]
    for one in crowd:
        one.start()
    time.sleep(0.3)
    try:
        for step in steps:
            time.sleep(step.pause_s)
            before, began = around() if around else {}, time.perf_counter()
            start.wait(STEP_TIMEOUT_S)
            done.wait(STEP_TIMEOUT_S)
            took_s = time.perf_counter() - began
            after = around() if around else {}
            count = processes * files
            cpu = {name: (after[name] - before[name]) / count * 1e6 for name in before}
            yield step.name, count / took_s, cpu
    finally:
        for one in crowd:
            one.join(5)
            one.kill()


def cpu_of(cluster: LocalCluster) -> Callable[[], dict[str, float]]:
    """Return what tells the CPU seconds of every process, user and system apart."""
    pids = {name: cluster.pid(name) for name in [*cluster.plan.service_names(), "fuse"]}

    def look() -> dict[str, float]:
        found = {}
        for name, pid in pids.items():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[f"{name} user"] = int(fields[11]) / TICKS_PER_S
            found[f"{name} sys"] = int(fields[12]) / TICKS_PER_S
        return found

    return look


@contextmanager
def passthrough(root: Path, cache: str) -> Iterator[Path]:
    """libfuse's example, mounted over a directory; what it calls source is the whole tree."""
    binary, mount = root / "passthrough", root / f"mount-{cache}"
    if not binary.exists():
        flags = run("pkg-config", "--cflags", "--libs", "fuse3").stdout.split()
        run("gcc", "-O2", "-o", binary, EXAMPLE, "-lpthread", *flags)
    source = root / f"source-{cache}"
    source.mkdir()
    mount.mkdir()
    options = f"source={source},cache={cache}"
    process = subprocess.Popen(  # its warning about threads is of no use here
        [binary, "-f", "-o", options, mount], stderr=subprocess.DEVNULL
    )
    try:
        wait_until(mount.is_mount, 10)
        yield mount
    finally:
        subprocess.run(["fusermount3", "-uz", mount], check=False, timeout=20)
        process.wait(10)


def round_trip_us(mount: Path, count: int = 3000) -> float:
    """Microseconds of a stat that goes to user space and back, nothing cached."""
    path = mount / "x"
    path.touch()
    began = time.perf_counter()
    for _ in range(count):
        os.stat(path)
    return (time.perf_counter() - began) / count * 1e6


def big_directory(cluster: LocalCluster, names: int) -> None:
    """Very many names: made by the library, listed by the kernel, removed in one step."""
    directory = cluster.mount / "big"
    directory.mkdir()
    start_mib, began = memory_mib(cluster), time.perf_counter()
    with Client(cluster.plan.mgmtd_address, cluster=cluster.plan.cluster) as fs:
        for first in range(0, names, PAGE_NAMES):
            page = range(first, min(names, first + PAGE_NAMES))
            assert not any(fs.batch_create([(f"/big/{n:08d}", b"") for n in page]))
        filled_s = time.perf_counter() - began
        before_mib, began = memory_mib(cluster), time.perf_counter()
        count = sum(1 for _ in os.scandir(directory))
        listed_s = time.perf_counter() - began
        assert count == names, (count, names)
        after_mib, began = memory_mib(cluster), time.perf_counter()
        fs.remove_tree("/big")
        removed_s = time.perf_counter() - began
    print(f"{names} names in a directory: {names / filled_s:.0f}/s made by batch_create, "
          f"{names / listed_s:.0f}/s listed, removed in {removed_s * 1000:.1f} ms")  # fmt: skip
    told = (f"{n} {start_mib[n]} / {before_mib[n]} / {after_mib[n]}" for n in before_mib)
    print("  MiB before, filled, listed:", ", ".join(told))


def show(cluster: LocalCluster, root: Path, processes: int, files: int) -> None:
    """Print the table of one number of processes."""
    local = {name: rate for name, rate, _ in rates(root / f"l{processes}", processes, files)}
    with passthrough(root, "auto") as mount:
        plain = {name: rate for name, rate, _ in rates(mount / f"f{processes}", processes, files)}
    shutil.rmtree(root / "mount-auto", ignore_errors=True)
    shutil.rmtree(root / "source-auto", ignore_errors=True)
    print(f"\n{processes} process{'es' if processes > 1 else ''}, {files} files each")
    print(f"{'':26}{'op/s':>8}{'local':>9}{'ratio':>7}{'C FUSE':>9}{'ratio':>7}   us of CPU per op")
    where = cluster.mount / f"n{processes}"
    for name, rate, cpu in rates(where, processes, files, cpu_of(cluster)):
        storages = sum(us for key, us in cpu.items() if key.startswith("storage"))
        said = ", ".join(
            f"{service} {cpu[f'{service} user']:.0f}+{cpu[f'{service} sys']:.0f}"
            for service in ("fuse", "meta")
        )
        print(
            f"{name:26}{rate:8.0f}{local[name]:9.0f}{rate / local[name]:7.3f}{plain[name]:9.0f}"
            f"{rate / plain[name]:7.2f}   {said}, storages {storages:.0f}",
            flush=True,
        )


def main() -> None:
    files = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    names = int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    with local_cluster() as cluster:
        cluster.up()
        root = cluster.root / "local"
        root.mkdir()
        with passthrough(root, "never") as mount:
            print(f"one round trip through FUSE (C, nothing cached): {round_trip_us(mount):.0f} us")
        for processes in (1, 4):
            show(cluster, root, processes, files)
        print()
        if names:
            big_directory(cluster, names)


if __name__ == "__main__":
    main()
