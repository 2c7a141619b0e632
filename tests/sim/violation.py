"""What a checker says when a promise was broken."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from sim.history import Op


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise: which rule, in words, and the operations that show it."""

    rule: str
    text: str
    ops: tuple[Op, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.rule}: {self.text}", *(f"    {op}" for op in self.ops)]
        return "\n".join(lines)


@dataclass(slots=True)
class Verdict:
    """What a search found. `undecided` names what its budget did not suffice for."""

    violations: list[Violation] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    decided: int = 0  # histories (chunks, trees) that were searched to an end


def report(violations: Iterable[Violation], limit: int = 10) -> str:
    """Return a text for a failing test: the first violations in full, then how many more."""
    found = list(violations)
    lines = [str(violation) for violation in found[:limit]]
    if len(found) > limit:
        lines.append(f"... and {len(found) - limit} more")
    return "\n".join(lines)
