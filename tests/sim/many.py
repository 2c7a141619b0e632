"""Many simulations on all cores, with the figures that docs/faults.md quotes.

    python -m sim.many [COUNT] [--first 0] [--wall SECONDS] [--kinds chunks,files,scripts]
                       [--seconds 30] [--jobs N]

Ends with 1 if any seed failed; each of those is told in full, with the command that repeats it.
"""

import argparse
import itertools
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field

from sim.improvise import THEMES, improvise
from sim.lastwords import last_words
from sim.run import SECONDS, Outcome, fix_hashes, mood_of, simulate, tell

KINDS = ("chunks", "files", "scripts")  # moods of bare chunks, of names and files; improvised


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


def play(kind: str, seed: int, seconds: float) -> Outcome:
    """Play one history of a kind."""
    if kind == "scripts":
        themes = list(THEMES)
        outcome = improvise(seed // len(themes), themes[seed % len(themes)])
    else:
        outcome = simulate(seed, mood_of(seed, kind == "files"), seconds)
    return outcome


def one(kind: str, seed: int, seconds: float) -> Summary:
    """Play a history; in a process of its own kind, so everything in the answer is small."""
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # the killed leave them

    def again() -> Outcome:
        return play(kind, seed, seconds)

    try:
        outcome = again()
        told = [tell(outcome, last_words(again))] if outcome.violations else []
    except Exception as problem:
        return Summary(1, failures=[f"{kind} {seed}: the simulator itself failed: {problem!r}"])
    return Summary(
        1,
        outcome.operations,
        outcome.errors,
        outcome.undecided,
        outcome.virtual_s,
        Counter([outcome.mood]),
        outcome.faults,
        told,
    )


def many(work: Iterator[tuple[str, int]], seconds: float, wall_s: float, jobs: int) -> Summary:
    """Play (kind, seed) after (kind, seed) until they or the time are used up."""
    end_s = time.monotonic() + wall_s if wall_s else float("inf")
    total = Summary()
    with ProcessPoolExecutor(jobs, max_tasks_per_child=200) as pool:
        running = {
            pool.submit(one, kind, seed, seconds) for kind, seed in itertools.islice(work, 2 * jobs)
        }
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                found = future.result()
                for text in found.failures:
                    print(text, flush=True)
                total.add(found)
            if time.monotonic() < end_s:
                new = itertools.islice(work, len(done))
                running |= {pool.submit(one, kind, seed, seconds) for kind, seed in new}
    return total


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="sim.many", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=0, help="0: until the time is up")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--wall", type=float, default=0.0, help="stop after so many seconds")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of faults, virtual")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kinds", default="chunks", help=f"of {', '.join(KINDS)}; by commas")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if not set(kinds) <= set(KINDS):
        parser.error(f"--kinds knows {', '.join(KINDS)}")
    if not options.count and not options.wall:
        parser.error("say how many, or --wall SECONDS")
    last = options.first + options.count if options.count else 1 << 60
    began_s = time.monotonic()
    work = ((kind, seed) for seed in range(options.first, last) for kind in kinds)
    total = many(work, options.seconds, options.wall, options.jobs)
    print("\n".join(total.lines(time.monotonic() - began_s)))
    return 1 if total.failures else 0


if __name__ == "__main__":
    fix_hashes("sim.many")
    sys.exit(main())
