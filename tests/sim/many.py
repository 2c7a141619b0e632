"""Many simulations on all cores, with the figures that docs/faults.md quotes.

    python -m sim.many [COUNT] [--first 0] [--wall SECONDS] [--seconds 30] [--jobs N] [--files]

Ends with 1 if any seed failed; each of those is told in full, with the command that repeats it.
"""

import argparse
import itertools
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field

from sim.run import SECONDS, fix_hashes, mood_of, simulate, tell


@dataclass
class Summary:
    """The figures of one history, or of many."""

    histories: int = 0
    operations: int = 0
    errors: int = 0
    undecided: int = 0
    virtual_s: float = 0.0
    moods: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)  # told in full

    def add(self, other: "Summary") -> None:
        """Take in another one."""
        self.histories += other.histories
        self.operations += other.operations
        self.errors += other.errors
        self.undecided += other.undecided
        self.virtual_s += other.virtual_s
        self.moods += other.moods
        self.faults += other.faults
        self.failures += other.failures

    def lines(self, took_s: float) -> list[str]:
        """Say it in words."""
        return [
            f"{self.histories} histories, {self.operations} operations ({self.errors} errors at "
            f"clients, {self.undecided} chunks undecided), {self.virtual_s / 3600:.2f} virtual "
            f"hours in {took_s:.0f} s: {self.virtual_s / took_s:.0f} cluster-seconds per second, "
            f"{self.histories / took_s * 60:.0f} histories per minute",
            "moods: " + ", ".join(f"{mood} {n}" for mood, n in sorted(self.moods.items())),
            "faults: " + ", ".join(f"{kind} {n}" for kind, n in sorted(self.faults.items())),
            f"{len(self.failures)} histories violate" if self.failures else "no violation",
        ]


def one(seed: int, seconds: float, files: bool = False) -> Summary:
    """Simulate a seed; in a process of its own kind, so everything in the answer is small."""
    logging.disable(logging.CRITICAL)
    try:
        outcome = simulate(seed, mood_of(seed, files), seconds)
    except Exception as problem:
        return Summary(1, failures=[f"seed {seed}: the simulator itself failed: {problem!r}"])
    return Summary(
        1,
        outcome.operations,
        outcome.errors,
        outcome.undecided,
        outcome.virtual_s,
        Counter([outcome.mood]),
        outcome.faults,
        [tell(outcome)] if outcome.violations else [],
    )


def many(
    seeds: Iterator[int], seconds: float, wall_s: float, jobs: int, files: bool = False
) -> Summary:
    """Simulate until the seeds or the time are used up."""
    end_s = time.monotonic() + wall_s if wall_s else float("inf")
    total = Summary()
    with ProcessPoolExecutor(jobs, max_tasks_per_child=200) as pool:
        running = {
            pool.submit(one, seed, seconds, files) for seed in itertools.islice(seeds, 2 * jobs)
        }
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                found = future.result()
                for text in found.failures:
                    print(text, flush=True)
                total.add(found)
            if time.monotonic() < end_s:
                new = itertools.islice(seeds, len(done))
                running |= {pool.submit(one, seed, seconds, files) for seed in new}
    return total


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="sim.many", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=0, help="0: until the time is up")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--wall", type=float, default=0.0, help="stop after so many seconds")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of faults, virtual")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--files", action="store_true", help="the moods of names and files")
    options = parser.parse_args()
    if not options.count and not options.wall:
        parser.error("say how many, or --wall SECONDS")
    last = options.first + options.count if options.count else 1 << 60
    began_s = time.monotonic()
    seeds = iter(range(options.first, last))
    total = many(seeds, options.seconds, options.wall, options.jobs, options.files)
    print("\n".join(total.lines(time.monotonic() - began_s)))
    return 1 if total.failures else 0


if __name__ == "__main__":
    fix_hashes("sim.many")
    sys.exit(main())
