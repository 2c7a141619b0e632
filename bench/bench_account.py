"""Where the CPU time of one 4 KiB read goes: by process, and within it by what runs (perf).

Native reads through a ring, alone and in batches, and reads through the kernel's FUSE layer. A
share is perf's, by shared object, times the CPU time per read that the kernel has accounted.

python bench/bench_account.py [--seconds 4]       needs perf and the right to use it
"""

import argparse
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_ring import read_loop
from measure import FILE_BYTES, Cpu, Pace, random_offsets

from emberfs.client.native.connection import Connection
from emberfs.proto.ids import KiB
from integration.harness import LocalCluster, local_cluster

BLOCK = 4 * KiB
# Parts of a shared object's name -> how the account calls it; the first that fits.
KINDS = (
    ("kernel", "kernel"),
    ("vmlinux", "kernel"),
    ("fuse", "libfuse and pyfuse3"),
    ("_batch", "compiled loops"),
    ("_plainread", "compiled loops"),
    ("_sinks", "compiled loops"),
    ("_entries", "compiled loops"),
    ("_ring", "compiled loops"),
    ("uvloop", "event loop"),
    ("loop.", "event loop"),
    ("python", "Python"),
)


def kind_of(shared_object: str) -> str:
    """How the account calls a shared object."""
    return next((name for part, name in KINDS if part in shared_object), "libraries")


def shares(recording: Path) -> dict[str, float]:
    """Part of a recording's samples by kind."""
    report = subprocess.run(
        ["perf", "report", "-i", recording, "--no-children", "--stdio", "-g", "none",
         "--sort", "dso"],
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    found: Counter[str] = Counter()
    for line in report.stdout.splitlines():
        words = line.split()
        if len(words) == 2 and words[0].endswith("%"):
            found[kind_of(words[1])] += float(words[0][:-1]) / 100
    return dict(found)


def watched(
    cluster: LocalCluster, seconds: float, work: Callable[[], tuple[Pace, dict[str, float]]]
) -> None:
    """Do some work, print its rate and the account of the servers' CPU time per read."""
    names = {"daemon": ["fuse"], "storage": cluster.plan.storage_names()}
    with tempfile.TemporaryDirectory() as directory:
        recordings = {name: Path(directory) / name for name in names}
        recording = [
            subprocess.Popen(
                ["perf", "record", "-q", "-F", "999", "-o", recordings[name],
                 "-p", ",".join(str(cluster.pid(service)) for service in services),
                 "--", "sleep", str(seconds)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for name, services in names.items()
        ]  # fmt: skip
        pace, used_s = work()
        spent = {name: value * 1e6 / pace.count for name, value in used_s.items()}
        for one in recording:
            one.wait()
        print(f"    {pace.per_s:,.0f} reads/s; application {spent['app']:.1f} us")
        for name in names:
            parts = sorted(shares(recordings[name]).items(), key=lambda part: -part[1])
            each = ", ".join(
                f"{kind} {share * spent[name]:.1f}" for kind, share in parts if share > 0.01
            )
            print(f"    {name:<8} {spent[name]:6.1f} us: {each}")


def through_fuse(
    cluster: LocalCluster, path: Path, readers: int, seconds: float
) -> tuple[Pace, dict[str, float]]:
    """O_DIRECT reads of 4 KiB by threads of this process."""
    offsets = random_offsets(BLOCK)
    counts = [0] * readers
    end = time.perf_counter() + seconds

    def read(number: int) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        memory = mmap.mmap(-1, BLOCK)
        place = number * 1000
        while time.perf_counter() < end:
            os.preadv(fd, [memory], offsets[place % len(offsets)])
            place += 1
            counts[number] += 1
        os.close(fd)

    cpu, began = Cpu(cluster), time.perf_counter()
    threads = [threading.Thread(target=read, args=(number,)) for number in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Pace(sum(counts), time.perf_counter() - began), cpu.spent()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    seconds = parser.parse_args().seconds
    if shutil.which("perf") is None:
        print("perf is not installed (linux-perf): no account")
        return
    with local_cluster() as cluster:
        cluster.up()
        path = cluster.mount / "bench"
        path.write_bytes(os.urandom(FILE_BYTES))
        with Connection(cluster.mount) as daemon:
            for depth in (1, 64, 256):
                print(f"ring, depth {depth}")
                watched(
                    cluster,
                    seconds,
                    lambda depth=depth: read_loop(cluster, daemon, path, BLOCK, depth, seconds),  # type: ignore[misc]
                )
        for readers in (1, 8):
            print(f"FUSE, O_DIRECT, readers: {readers}")
            watched(
                cluster,
                seconds,
                lambda readers=readers: through_fuse(cluster, path, readers, seconds),  # type: ignore[misc]
            )


if __name__ == "__main__":
    main()
