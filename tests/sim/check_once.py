"""Exactly once: no operation is applied twice, none that was acknowledged is missing.

For plain writes a second application over newer data is a violation of linearizability and found
there. Here: what a target logged as committed, what it remembers, and operations whose repetition
shows in the result (appends, increments).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sim.history import Op, show_key
from sim.stamps import CELL_BYTES, number_of
from sim.violation import Violation


class Applied(NamedTuple):
    """A target committed a tagged update as a version of a chunk (resync copies are not logged)."""

    target: int
    chunk: bytes
    client: int
    channel: int
    sequence: int
    version: int


def check_once(log: Iterable[Applied], across: bool = True) -> list[Violation]:
    """No tag became two versions of a chunk; with `across` not even at two targets."""
    first: dict[tuple[int, bytes, int, int, int], Applied] = {}
    found: list[Violation] = []
    for entry in log:
        tag = (entry.chunk, entry.client, entry.channel, entry.sequence)
        before = first.setdefault((0 if across else entry.target, *tag), entry)
        if before.version != entry.version:
            text = (
                f"chunk {entry.chunk.hex()}: (client, channel, sequence) {tag[1:]} became version "
                f"{before.version} at target {before.target} and {entry.version} at {entry.target}"
            )
            found.append(Violation("applied twice", text))
    return found


def check_remembered(
    remembered: Iterable[Applied], acknowledged: Iterable[Applied]
) -> list[Violation]:
    """A target keeps one record per (client, channel) of a chunk, not older than what it answered.

    `acknowledged` may be a log of commits, or made from the answers that the clients got.
    """
    found: list[Violation] = []
    kept: dict[tuple[int, bytes, int, int], Applied] = {}
    for entry in remembered:
        place = (entry.target, entry.chunk, entry.client, entry.channel)
        if place in kept:
            found.append(Violation("remembered twice", f"{kept[place]} and {entry}"))
        kept[place] = entry
    for entry in acknowledged:
        known = kept.get((entry.target, entry.chunk, entry.client, entry.channel))
        if known is not None and known.sequence < entry.sequence:
            found.append(Violation("forgotten", f"{entry} was answered, {known} is remembered"))
    return found


def check_appends(ops: Iterable[Op], content: bytes) -> list[Violation]:
    """Check the final content of a file that was only appended to (lengths: multiples of 8)."""
    appends = {op.stamp: op for op in ops if op.kind == "append"}
    found: list[Violation] = []
    order: list[Op] = []
    at = 0
    while at < len(content):
        number = number_of(content[at : at + CELL_BYTES])
        op = appends.get(number or 0)
        if op is None or op.outcome == "fail":
            text = f"position {at} holds {content[at : at + CELL_BYTES].hex()}, no append wrote it"
            return [*found, Violation("foreign record", text, (op,) if op else ())]
        whole = content[at : at + op.length]
        if whole != content[at : at + CELL_BYTES] * (op.length // CELL_BYTES):
            return [*found, Violation("torn record", f"{show_key(op.key)} position {at}", (op,))]
        if op in order:
            found.append(Violation("applied twice", f"again at position {at}", (op,)))
        order.append(op)
        at += op.length
    present = set(order)
    found += [
        Violation("lost", "this append is missing", (op,))
        for op in appends.values()
        if op.ok and op not in present
    ]
    return found + _out_of_order(order)


def _out_of_order(order: Sequence[Op]) -> list[Violation]:
    latest: Op | None = None
    found = []
    for op in order:
        if latest is not None and op.effect_by_ns < latest.start_ns:
            found.append(Violation("out of order", "the first stands behind", (op, latest)))
        if latest is None or op.start_ns > latest.start_ns:
            latest = op
    return found


def check_count(ops: Iterable[Op], kind: str, final: int) -> list[Violation]:
    """Check the sum of increments by one: every acknowledged one, each unknown one at most once."""
    some = [op for op in ops if op.kind == kind]
    least = sum(op.ok for op in some)
    most = sum(op.outcome != "fail" for op in some)
    if least <= final <= most:
        return []
    text = f"{kind}: {final}, but {least} were acknowledged and at most {most} can have happened"
    return [Violation("applied twice" if final > most else "lost", text)]
