"""Named ways to break the product code, to prove that the simulator notices.

A mutation patches classes and modules of the running program and takes everything back; it names
the moods in which to look for it and the rules that may be violated. test_mutations.py runs them.

python -m sim.mutations [NAME ...] [--tries 12]      look for the seeds that notice them
"""

import argparse
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sim.run import ALL_MOODS, Outcome, simulate

SECONDS = 12.0
_MISSING = object()


class Patch:
    """Replaces attributes, and knows how to put them back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: object) -> None:
        """Replace an attribute of a class or module.

        One that is not there, or that is called otherwise: the product has moved on, and a mutation
        that breaks nothing, or breaks every call, would pass for one that nobody notices.
        """
        present = getattr(owner, name)
        assert _takes_calls_of(present, value), f"{owner.__name__}.{name} is called otherwise now"
        own = vars(owner).get(name, _MISSING)

        def back() -> None:
            if own is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

        self._undo.append(back)
        setattr(owner, name, value)

    def put(self, table: dict[Any, Any], key: object, value: object) -> None:
        """Replace an entry of a table."""
        own = table[key]
        self._undo.append(lambda: table.__setitem__(key, own))
        table[key] = value

    def wrap(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Replace a function by what `make` makes of it."""
        self.set(owner, name, make(getattr(owner, name)))

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()


def _takes_calls_of(present: object, value: object) -> bool:
    """Tell whether `value` can be called with all that `present` must be called with."""
    if not (inspect.isfunction(present) and inspect.isfunction(value)):
        return True
    place, name = [], {}
    for parameter in inspect.signature(present).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            name[parameter.name] = None
        elif parameter.kind is not parameter.VAR_KEYWORD:
            place += [None] if parameter.default is parameter.empty else []
    try:
        inspect.signature(value).bind(*place, **name)
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class Mutation:
    """One way to break the code."""

    name: str
    breaks: str  # what it does, in words
    moods: tuple[str, ...]
    rules: tuple[str, ...]  # any of these is the right answer
    seeds: tuple[int, ...]  # that notice it, the surest first
    seconds: float
    patch: Callable[[Patch], None]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Break the code for a while."""
        patch = Patch()
        try:
            self.patch(patch)
            yield
        finally:
            patch.undo()

    def noticed(self, outcome: Outcome) -> bool:
        """Tell whether a rule named here was violated."""
        return any(violation.rule in self.rules for violation in outcome.violations)

    def attempts(self, tries: int) -> Iterator[tuple[int, str]]:
        """Yield (seed, mood) to try: the known ones first."""
        for seed in self.seeds:
            yield seed, self.moods[0]
        for seed in range(tries):
            for mood in self.moods:
                if (seed, mood) not in [(known, self.moods[0]) for known in self.seeds]:
                    yield seed, mood


LINEAR = "future, stale, erased, lost, torn, phantom, atomic"
WRONG = f"{LINEAR}, replicas differ, scrub finding"  # of what clients see and what replicas hold

MUTATIONS: dict[str, Mutation] = {}


def mutation(
    moods: str, rules: str, seeds: tuple[int, ...] = (), seconds: float = SECONDS
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Register a function that patches; its name and docstring are the mutation's.

    `moods` and `rules` are lists separated by commas.
    """

    def register(patch: Callable[[Patch], None]) -> Callable[[Patch], None]:
        name = patch.__name__
        assert name not in MUTATIONS
        MUTATIONS[name] = Mutation(
            name,
            (patch.__doc__ or "").strip(),
            tuple(moods.split(", ")),
            tuple(rules.split(", ")),
            seeds,
            seconds,
            patch,
        )
        return patch

    return register


def run_mutation(found: Mutation, seed: int, mood: str) -> Outcome:
    """Simulate a seed with the code broken."""
    with found.applied():
        return simulate(seed, ALL_MOODS[mood], seconds=found.seconds)


def load() -> dict[str, Mutation]:
    """Return all mutations."""
    from sim import (
        mutate_client,
        mutate_control,
        mutate_disk,
        mutate_failover,
        mutate_files,
        mutate_inline,
        mutate_meta,
        mutate_metas,
        mutate_recovery,
        mutate_removal,
        mutate_replica,
        mutate_trees,
    )

    chunks = (mutate_replica, mutate_removal, mutate_recovery, mutate_disk)
    control = (mutate_control, mutate_client, mutate_failover)
    files = (mutate_meta, mutate_metas, mutate_files, mutate_inline, mutate_trees)
    for module in (*chunks, *control, *files):
        assert module.__doc__
    return MUTATIONS


def _search(found: Mutation, tries: int, enough: int) -> None:
    began, runs, hits = time.process_time(), 0, 0
    for seed, mood in found.attempts(tries):
        if time.process_time() - began > 20:
            break
        one = time.process_time()
        outcome = run_mutation(found, seed, mood)
        runs += 1
        rules = sorted({violation.rule for violation in outcome.violations})
        if rules:
            sign = "noticed" if found.noticed(outcome) else "OTHER"
            hits += sign == "noticed"
            took = time.process_time() - one
            print(f"  {found.name}: {sign} seed {seed} {mood} {took:.1f} s {rules}", flush=True)
            if (
                sign == "noticed"
                and simulate(seed, ALL_MOODS[mood], seconds=found.seconds).violations
            ):
                print(f"  UNBROKEN CODE FAILS: seed {seed} {mood} {found.seconds}", flush=True)
                hits -= 1
            if hits >= enough:
                break
    took = time.process_time() - began
    print(f"{found.name}: {hits} hits in {runs} runs, {took:.1f} s of CPU", flush=True)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="sim.mutations", description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tries", type=int, default=12, help="seeds per mood")
    parser.add_argument("--enough", type=int, default=1, help="stop after so many that notice")
    parser.add_argument("--part", default="0/1", help="of the mutations: INDEX/COUNT")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    index, _, count = options.part.partition("/")
    registry = load()
    for name in (options.names or list(registry))[int(index) :: int(count)]:
        _search(registry[name], options.tries, options.enough)
    return 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(
            sys.executable,
            [sys.executable, "-m", "sim.mutations", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    from sim import mutations  # not __main__: the parts register there

    sys.exit(mutations.main())
