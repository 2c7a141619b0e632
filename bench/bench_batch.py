"""Batches of small files against the loops that they replace, through the library, by one process.

All are done in turns of one run, so that whatever else the machine does meets all. Prints medians
of the turns: files per second of open + write + close in a loop, by 16 threads, and of batch_create
(all durable), the same of stat and batch_stat, and how many times faster the batch is than each.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from emberfs.client.blocking import Client

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from integration.harness import local_cluster

TURNS = 3
THREADS = 16
COUNTS = (150, 1000, 10_000)  # files: in the loop, by threads, in batches (under 0.1 s says little)
SIZES = (256, 4096, 8192)


class Figure(NamedTuple):
    """Files per second."""

    loop: float
    threads: float
    batch: float


def per_s(count: int, work: Callable[[], object]) -> float:
    """Time one piece of work on so many files."""
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def compare(
    one: Callable[[Any], object], many: Callable[[Any], object], parts: Sequence[Sequence[Any]]
) -> Figure:
    """Work on three sets of files: one by one, by threads, together."""
    alone, shared, together = parts

    def by_threads() -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, shared))

    return Figure(
        per_s(len(alone), lambda: [one(item) for item in alone]),
        per_s(len(shared), by_threads),
        per_s(len(together), lambda: many(together)),
    )


def turn(client: Client, directory: str) -> dict[str, Figure]:
    """Measure every line once."""
    client.mkdir(directory)

    def make(item: tuple[str, bytes]) -> None:
        path, data = item
        with client.open(path, "w") as file:
            file.write(data)

    def make_all(items: list[tuple[str, bytes]]) -> None:
        assert not any(client.batch_create(items))

    def stat_all(paths: list[str]) -> None:
        assert all(isinstance(one, os.stat_result) for one in client.batch_stat(paths))

    found = {}
    for size in SIZES:
        data = os.urandom(size)
        parts = [[(f"{directory}/{size}.{n}.{i}", data) for i in range(n)] for n in COUNTS]
        found[f"create {size} bytes, durable"] = compare(make, make_all, parts)
    paths = [path for path, _ in parts[-1]]
    found["stat"] = compare(client.stat, stat_all, [paths[:1000], paths[:2000], paths])
    return found


def main() -> None:
    with local_cluster() as cluster:
        cluster.up()
        plan = cluster.plan
        with Client(plan.mgmtd_address, cluster=plan.cluster) as client:
            turns = [turn(client, f"/turn{number}") for number in range(TURNS)]
        print(f"{'':26} {'loop':>9} {'threads':>9} {'batch':>9}  batch against each")
        for what in turns[0]:
            loop, threads, batch = map(
                statistics.median, zip(*(t[what] for t in turns), strict=True)
            )
            rates = f"{loop:7.0f}/s {threads:7.0f}/s {batch:7.0f}/s"
            print(f"{what:26} {rates} {batch / loop:7.1f} {batch / threads:7.1f}", flush=True)


if __name__ == "__main__":
    main()
