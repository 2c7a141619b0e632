"""Search for one order of whole operations that explains a history (Wing, Gong 1993; Lowe 2017).

Depth first over "which operation took effect next". Next can be any operation that had started
before the first of the remaining ones ended. Two things keep it small: a pair (set of operations
done, state) is tried once, and an operation that only looks is taken as soon as its answer fits,
which never spoils a solution, because it changes nothing.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

S = TypeVar("S", bound=Hashable)
Path = tuple[object, tuple[int, ...]]  # (path before, calls)

BUDGET_STEPS = 20_000  # states looked at, some 20 us each


class Call(NamedTuple):
    """The interval of an operation. One that is not required may be left out of the order."""

    start_ns: int
    end_ns: int
    required: bool
    observes: bool = False  # never changes the state


@dataclass(slots=True)
class Search:
    """What was found: an order, or none, or (`decided` False) the budget was used up."""

    order: tuple[int, ...] | None
    decided: bool
    deepest: int  # bit set: the most operations that any order could explain
    steps: int


def linearize(
    calls: Sequence[Call],
    state: S,
    apply: Callable[[S, int, int], S | None],
    budget_steps: int = BUDGET_STEPS,
) -> Search:
    """Search an order; `apply(state, call, done)` returns the next state, None if it does not fit.

    `done` is the bit set of the calls before it. Calls are named by their index.
    """
    order = sorted(range(len(calls)), key=lambda index: (calls[index].start_ns, index))
    needed = sum(1 << index for index, call in enumerate(calls) if call.required)
    seen: set[tuple[int, S]] = set()
    deepest, steps = 0, 0
    stack: list[tuple[int, S, Path | None]] = [(0, state, None)]
    while stack:
        steps += 1
        if steps > budget_steps:
            return Search(None, False, deepest, steps)
        done, state, path = stack.pop()
        while True:  # take every observer that fits
            candidates = _minimal(calls, order, done)
            fitting = [
                i for i in candidates if calls[i].observes and apply(state, i, done) is not None
            ]
            if not fitting:
                break
            done |= sum(1 << index for index in fitting)
            path = (path, tuple(fitting))
        if done.bit_count() > deepest.bit_count():
            deepest = done
        if not needed & ~done:
            return Search(_unroll(path), True, deepest, steps)
        if (done, state) in seen:
            continue
        seen.add((done, state))
        for index in sorted(candidates, key=lambda i: calls[i].end_ns, reverse=True):
            if calls[index].observes:
                continue
            after = apply(state, index, done)
            if after is not None:
                stack.append((done | 1 << index, after, (path, (index,))))
    return Search(None, True, deepest, steps)


def _unroll(path: Path | None) -> tuple[int, ...]:
    pieces = []
    at: object = path
    while isinstance(at, tuple):
        pieces.append(at[1])
        at = at[0]
    return tuple(index for piece in reversed(pieces) for index in piece)


def _minimal(calls: Sequence[Call], order: Sequence[int], done: int) -> list[int]:
    """Return the calls that no other remaining call must precede."""
    bound, found = None, []
    for index in order:
        if done >> index & 1:
            continue
        call = calls[index]
        if bound is not None and call.start_ns > bound:
            break
        found.append(index)
        if call.required and (bound is None or call.end_ns < bound):
            bound = call.end_ns
    return [index for index in found if bound is None or calls[index].start_ns <= bound]
