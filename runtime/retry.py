"""How long to wait before the next try."""

from typing import Protocol


class Uniform(Protocol):
    """The one thing needed of a random generator."""

    def uniform(self, a: float, b: float) -> float:
        """Return a number in [a, b]."""
        ...


class Backoff:
    """Doubling pauses with jitter, so that many clients do not return in step."""

    def __init__(self, first_ns: int, max_ns: int) -> None:
        assert 0 < first_ns <= max_ns
        self._first_ns = first_ns
        self._max_ns = max_ns
        self._next_ns = first_ns

    def next_ns(self, random: Uniform) -> int:
        """Return the next pause: between half and all of a value that doubles up to the bound."""
        pause_ns = self._next_ns
        self._next_ns = min(self._next_ns * 2, self._max_ns)
        return int(pause_ns * random.uniform(0.5, 1.0))

    def reset(self) -> None:
        """Begin again after a success."""
        self._next_ns = self._first_ns
