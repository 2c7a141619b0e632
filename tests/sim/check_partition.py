"""At most one side of a partition accepts writes, and at most one mgmtd is the primary."""

from collections.abc import Iterable
from typing import NamedTuple

from sim.violation import Violation


class Accepted(NamedTuple):
    """The head of a chain acknowledged a write to a client."""

    target: int
    chain: int
    chain_version: int
    begun_ns: int  # when the head took it up; the same as accepted_ns judges most strictly
    accepted_ns: int


class Answered(NamedTuple):
    """A mgmtd answered as primary."""

    mgmtd: int
    epoch: int
    begun_ns: int
    answered_ns: int


def check_writes(records: Iterable[Accepted]) -> list[Violation]:
    """One head per chain version, and nothing begun by an old one after a newer one answered.

    An answer of the old head may still be on its way when the new one begins to answer: that write
    is on all replicas. Hence it counts when a write was taken up.
    """
    some = list(records)
    found: list[Violation] = []
    heads: dict[tuple[int, int], Accepted] = {}
    for record in some:
        first = heads.setdefault((record.chain, record.chain_version), record)
        if first.target != record.target:
            found.append(Violation("two heads", f"{first} and {record}"))
    spans = [(r.chain, r.chain_version, r.begun_ns, r.accepted_ns, r) for r in some]
    return found + _overtaken(spans, "old side accepts")


def check_primaries(records: Iterable[Answered]) -> list[Violation]:
    """One mgmtd per epoch, and nothing begun in an old epoch after a newer one answered."""
    some = list(records)
    found: list[Violation] = []
    owners: dict[int, Answered] = {}
    for record in some:
        first = owners.setdefault(record.epoch, record)
        if first.mgmtd != record.mgmtd:
            found.append(Violation("two primaries", f"{first} and {record}"))
    return found + _overtaken(
        [(0, r.epoch, r.begun_ns, r.answered_ns, r) for r in some], "old primary answers"
    )


def _overtaken(
    spans: list[tuple[int, int, int, int, Accepted | Answered]], rule: str
) -> list[Violation]:
    """Report who began in an older version after a newer one of the same group had ended one."""
    ends = sorted(spans, key=lambda span: span[3])
    found: list[Violation] = []
    newest: dict[int, tuple[int, Accepted | Answered]] = {}
    at = 0
    for group, version, begun_ns, _, record in sorted(spans, key=lambda span: span[2]):
        while at < len(ends) and ends[at][3] < begun_ns:
            if ends[at][1] > newest.get(ends[at][0], (-1, record))[0]:
                newest[ends[at][0]] = ends[at][1], ends[at][4]
            at += 1
        if group in newest and newest[group][0] > version:
            found.append(Violation(rule, f"{record} after {newest[group][1]}"))
    return found
