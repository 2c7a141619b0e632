"""Situations: directed scenarios that a broken product does not survive, registered by name.

Each makes one interleaving certain that dice find rarely. The product as it is passes all of them
(test_situations.py); the mutations of pinned.DIRECTED fail in theirs (test_mutations.py).
"""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from sim.cluster import Shape
from sim.run import Outcome
from sim.scenario import Scene, stage

Script = Callable[[Scene], Coroutine[Any, Any, None]]

QUIET = Shape(chains=1, scrub=False)  # the scrubber would mend what a broken product leaves


@dataclass(frozen=True)
class Situation:
    """A script with what it needs."""

    name: str
    script: Script
    shape: Shape
    errors: bool  # clients may meet them
    load: bool


SITUATIONS: dict[str, Situation] = {}


def situation(
    *, shape: Shape = QUIET, errors: bool = False, load: bool = False
) -> Callable[[Script], Script]:
    """Register a script under its name."""

    def register(script: Script) -> Script:
        name = script.__name__
        assert name not in SITUATIONS
        SITUATIONS[name] = Situation(name, script, shape, errors, load)
        return script

    return register


def load_all() -> dict[str, Situation]:
    """Return all situations."""
    from sim import (
        situation_control,
        situation_failover,
        situation_fencing,
        situation_power,
        situation_recovery,
        situation_replica,
    )

    parts = (
        situation_replica,
        situation_recovery,
        situation_fencing,
        situation_power,
        situation_control,
        situation_failover,
    )
    assert all(part.__doc__ for part in parts)
    return SITUATIONS


def enact(name: str) -> Outcome:
    """Play a situation with the product as it is just now."""
    found = SITUATIONS[name]
    return stage(found.script, shape=found.shape, load=found.load, errors=found.errors)
