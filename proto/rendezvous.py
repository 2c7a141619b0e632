"""Rendezvous hashing: everybody who knows the same nodes names the same one for a key.

When a node goes, only its keys move, evenly to all others; when it is back, they return.
"""

from collections.abc import Iterable

_MASK = (1 << 64) - 1


def _mix(number: int) -> int:
    """Scatter 64 bits (splitmix64)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


def weight(key: int, node: int) -> int:
    """How much a key wants to be at a node."""
    return _mix(_mix(key & _MASK) ^ _mix(node ^ 0x5851F42D4C957F2D))


def home_of(key: int, nodes: Iterable[int]) -> int:
    """Return the node of a key; there must be one."""
    return max(nodes, key=lambda node: (weight(key, node), node))
