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
from sim.scenario_files import Stage, stage_files

Script = Callable[[Scene], Coroutine[Any, Any, None]]
FileScript = Callable[[Stage], Coroutine[Any, Any, None]]

# The scrubber would mend what a broken product leaves.
QUIET = Shape(chains=1, scrub=False)
QUIET_FILES = Shape(meta=1, chains=1, scrub=False)
QUIET_METAS = Shape(meta=2, shared=True, chains=1, scrub=False)


@dataclass(frozen=True)
class Situation:
    """A script with what it needs."""

    name: str
    play: Callable[[], Outcome]


SITUATIONS: dict[str, Situation] = {}


def situation(
    *, shape: Shape = QUIET, errors: bool = False, load: bool = False
) -> Callable[[Script], Script]:
    """Register a script of chunks under its name. `errors`: clients may meet them."""

    def register(script: Script) -> Script:
        _add(script.__name__, lambda: stage(script, shape=shape, load=load, errors=errors))
        return script

    return register


def file_situation(script: FileScript) -> FileScript:
    """Register a script of names and files, on a metadata server, under its name."""
    _add(script.__name__, lambda: stage_files(script, shape=QUIET_FILES))
    return script


def metas_situation(script: FileScript) -> FileScript:
    """As file_situation, on two metadata servers that share a store."""
    _add(script.__name__, lambda: stage_files(script, shape=QUIET_METAS))
    return script


def _add(name: str, play: Callable[[], Outcome]) -> None:
    assert name not in SITUATIONS
    SITUATIONS[name] = Situation(name, play)


def load_all() -> dict[str, Situation]:
    """Return all situations."""
    from sim import (
        situation_control,
        situation_failover,
        situation_fencing,
        situation_files,
        situation_inline,
        situation_metas,
        situation_names,
        situation_power,
        situation_recovery,
        situation_removal,
        situation_replica,
        situation_trees,
    )

    parts = (
        situation_replica,
        situation_removal,
        situation_recovery,
        situation_fencing,
        situation_power,
        situation_control,
        situation_failover,
        situation_files,
        situation_inline,
        situation_names,
        situation_metas,
        situation_trees,
    )
    assert all(part.__doc__ for part in parts)
    return SITUATIONS


def enact(name: str) -> Outcome:
    """Play a situation with the product as it is just now."""
    return SITUATIONS[name].play()
