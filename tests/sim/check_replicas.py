"""At a quiet end all serving replicas of a chain hold the same, and nothing is half done."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sim.violation import Violation


class ChunkState(NamedTuple):
    """A committed chunk at one replica."""

    version: int
    length: int
    digest: str  # of the content, computed from the bytes, not from stored checksums


@dataclass(slots=True)
class Replica:
    """What one target holds."""

    chain: int
    target: int
    serving: bool
    chunks: Mapping[bytes, ChunkState]
    pending: Iterable[bytes] = field(default=())


def check_replicas(replicas: Iterable[Replica]) -> list[Violation]:
    """Compare every serving replica with the first of its chain."""
    found: list[Violation] = []
    first_of: dict[int, Replica] = {}
    for replica in replicas:
        if not replica.serving:
            continue
        for chunk in sorted(replica.pending):
            text = f"chain {replica.chain} target {replica.target}: chunk {chunk.hex()}"
            found.append(Violation("still pending", text))
        first = first_of.setdefault(replica.chain, replica)
        if first is not replica:
            found.extend(_differences(first, replica))
    return found


def _differences(one: Replica, other: Replica) -> Iterable[Violation]:
    for chunk in sorted(one.chunks.keys() | other.chunks.keys()):
        here, there = one.chunks.get(chunk), other.chunks.get(chunk)
        if here != there:
            text = (
                f"chain {one.chain} chunk {chunk.hex()}: target {one.target} has "
                f"{here or 'none'}, target {other.target} has {there or 'none'}"
            )
            yield Violation("replicas differ", text)
