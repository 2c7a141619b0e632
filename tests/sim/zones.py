"""Linearizability of one register in n log n (Gibbons and Korach, 1997).

All operations on one value, a write and the reads that saw it, follow each other in any order that
explains the history. So value A must precede value B if some operation on A ended before some
operation on B started. With first_end = when the first operation on a value ended, and last_start =
when the last one started: A precedes B if A.first_end < B.last_start. Two values that must precede
each other are a violation, and where write values are unique there is no other kind.

Zeros are not unique (start, truncate, remove). Histories without erasures are decided exactly;
with them these are necessary conditions, and the exact search decides.
"""

from dataclasses import dataclass

from sim.history import FOREVER_NS, Op
from sim.segments import ZERO, ChunkHistory, Part
from sim.violation import Violation

BEFORE_ALL_NS = -FOREVER_NS


@dataclass(slots=True)
class Zone:
    """One value of one register: when it must have been the current one."""

    value: int
    first_end: int
    last_start: int
    ended: Op  # who ended first
    started: Op  # who started last

    def add(self, part: Part) -> None:
        """Another operation saw this value."""
        if part.end_ns < self.first_end:
            self.first_end, self.ended = part.end_ns, part.op
        if part.start_ns > self.last_start:
            self.last_start, self.started = part.start_ns, part.op


def check_zones(chunk: ChunkHistory) -> list[Violation]:
    """Check every segment by itself; at most one violation per segment."""
    count = len(chunk.cuts) - 1
    zones: list[dict[int, Zone]] = [{} for _ in range(count)]
    zero_reads: list[list[Part]] = [[] for _ in range(count)]
    for part in chunk.writes:
        if part.required:
            for segment in range(part.first, part.last):
                op = part.op
                zones[segment][part.value] = Zone(part.value, part.end_ns, part.start_ns, op, op)
    found: dict[int, Violation] = {}
    for part in chunk.reads:
        for segment, value in enumerate(part.seen, part.first):
            if not isinstance(value, int):
                continue
            if value <= ZERO:
                zero_reads[segment].append(part)
                continue
            zone = zones[segment][value]
            zone.add(part)
    for segment in range(count):
        violation = (
            _future(chunk, segment, zones[segment])
            or _crossing(chunk, segment, zones[segment])
            or _erased(chunk, segment, zones[segment], zero_reads[segment])
        )
        if violation is not None:
            found[segment] = violation
    return list(found.values())


def _future(chunk: ChunkHistory, segment: int, zones: dict[int, Zone]) -> Violation | None:
    for zone in zones.values():
        if zone.ended.kind == "read":
            write = next(part for part in chunk.writes if part.value == zone.value)
            if zone.first_end < write.start_ns:
                text = f"{chunk.place(segment)}: a read saw w{zone.value} before it was written"
                return Violation("future", text, (zone.ended, write.op))
    return None


def _crossing(chunk: ChunkHistory, segment: int, zones: dict[int, Zone]) -> Violation | None:
    widest: Zone | None = None
    for zone in sorted(zones.values(), key=lambda zone: (zone.first_end, zone.value)):
        if (
            widest is not None
            and zone.first_end < widest.last_start
            and widest.first_end < zone.last_start
        ):
            return _twice(chunk, segment, widest, zone)
        if widest is None or zone.last_start > widest.last_start:
            widest = zone
    return None


def _twice(chunk: ChunkHistory, segment: int, one: Zone, other: Zone) -> Violation:
    text = (
        f"{chunk.place(segment)}: w{one.value} comes before w{other.value} "
        f"(#{one.ended.number} ended before #{other.started.number} started) and after it "
        f"(#{other.ended.number} ended before #{one.started.number} started)"
    )
    ops = {op.number: op for op in (one.ended, other.ended, other.started, one.started)}
    for zone in (one, other):
        ops |= {op.number: op for op in _writes(chunk, zone.value)}
    return Violation("stale", text, tuple(ops[number] for number in sorted(ops)))


def _writes(chunk: ChunkHistory, value: int) -> list[Op]:
    return [part.op for part in chunk.writes if part.value == value]


def _erased(
    chunk: ChunkHistory, segment: int, zones: dict[int, Zone], reads: list[Part]
) -> Violation | None:
    erases = [part for part in chunk.erases if part.first <= segment]
    for erase in erases:
        for zone in zones.values():
            between = zone.first_end < erase.start_ns and erase.end_ns < zone.last_start
            if erase.required and between:
                text = f"{chunk.place(segment)}: w{zone.value} was seen again after it was erased"
                return Violation("erased", text, (zone.ended, erase.op, zone.started))
    if not zones:
        return None
    first = min(zones.values(), key=lambda zone: zone.first_end)
    for read in reads:
        if first.first_end >= read.start_ns:
            continue  # the zeros of the beginning
        if not any(_viable(erase, read, zones) for erase in erases):
            text = f"{chunk.place(segment)}: a read saw zeros where w{first.value} had been written"
            ops = (*_writes(chunk, first.value), first.ended, *(e.op for e in erases), read.op)
            return Violation("lost", text, tuple(dict.fromkeys(ops)))
    return None


def _viable(erase: Part, read: Part, zones: dict[int, Zone]) -> bool:
    """Tell whether a read can have seen the zeros of this erasure."""
    return erase.start_ns <= read.end_ns and not any(
        erase.end_ns < zone.last_start and zone.first_end < read.start_ns for zone in zones.values()
    )
