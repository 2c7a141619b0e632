"""Cut the bytes of one chunk where any operation begins or ends, and say what each read saw there.

Between two cuts every operation covers all bytes or none, so each piece (segment) is one register.
Its values: the number of a write, ZERO (never written, cut off, or removed), ABSENT (behind the
end; only where lengths are watched, otherwise the same as ZERO). A read that saw in one segment
what no single write can have put there is reported here.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from sim.history import FOREVER_NS, Key, Op, show_key
from sim.stamps import CELL_BYTES, Run, bytes_of, carries, number_of, stamp_fill
from sim.violation import Violation

ZERO = 0
ABSENT = -1
Value = int | frozenset[int]  # a set: too few bytes to tell which


@dataclass(slots=True)
class Part:
    """What one operation did to, or saw in, the segments first .. last (exclusive)."""

    op: Op
    first: int
    last: int
    start_ns: int
    end_ns: int  # FOREVER_NS where the outcome is unknown
    required: bool  # it certainly took effect
    value: int = ZERO  # of a write
    seen: tuple[Value, ...] = ()  # of a read, a value per segment


@dataclass(slots=True)
class ChunkHistory:
    """The operations of one chunk over its segments."""

    key: Key
    cuts: list[int]  # segment i is cuts[i] .. cuts[i + 1]
    writes: list[Part] = field(default_factory=list)
    erases: list[Part] = field(default_factory=list)  # truncate and remove, to the last segment
    reads: list[Part] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    lengths: bool = False

    def place(self, segment: int) -> str:
        """Name a segment."""
        return f"{show_key(self.key)} bytes [{self.cuts[segment]}, {self.cuts[segment + 1]})"


def split(
    key: Key, ops: Sequence[Op], low: int = 0, high: int = FOREVER_NS, lengths: bool = False
) -> ChunkHistory:
    """Return the history of positions low .. high of a key; `ops` are all those of the key."""
    present = [op for op in ops if op.outcome != "fail" and (op.kind != "read" or op.ok)]
    data = [op for op in present if op.kind in ("read", "write") and op.length]
    data = [op for op in data if op.offset < high and op.stop > low]
    if not any(op.kind == "read" for op in data):
        return ChunkHistory(key, [low])
    erases = [op for op in present if op.kind in ("truncate", "remove")]
    chunk = ChunkHistory(key, _cuts(data, erases, low, high), lengths=lengths)
    for op in data:
        if op.kind == "write":
            chunk.writes.append(_part(chunk, op, op.offset, op.stop, op.stamp))
    for op in erases:
        if op.offset < chunk.cuts[-1] or lengths:
            start = op.offset if op.kind == "truncate" else 0
            chunk.erases.append(_part(chunk, op, start, chunk.cuts[-1]))
    _drop_unseen(chunk, [op for op in data if op.kind == "read"])
    return chunk


def _cuts(data: Sequence[Op], erases: Sequence[Op], low: int, high: int) -> list[int]:
    top = min(high, max(op.stop for op in data))
    cuts = {low, top}
    for op in data:
        cuts.update((op.offset, op.stop))
        if op.kind == "read":
            cuts.add(op.offset + sum(run.length for run in op.data))
    cuts.update(op.offset for op in erases if op.kind == "truncate")
    return sorted(cut for cut in cuts if low <= cut <= top)


def _part(chunk: ChunkHistory, op: Op, start: int, stop: int, value: int = ZERO) -> Part:
    cuts = chunk.cuts
    first, last = bisect_left(cuts, max(start, cuts[0])), bisect_left(cuts, min(stop, cuts[-1]))
    return Part(op, first, last, op.start_ns, op.effect_by_ns, op.ok, value)


class _Writers:
    """Who wrote a segment."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self._of_bytes: dict[bytes, list[int]] = {}

    def of_bytes(self, start: int, stop: int) -> dict[bytes, list[int]]:
        """Return who left which bytes in a segment too short to hold a whole number."""
        if not self._of_bytes:
            for number in (ZERO, *sorted(self.numbers)):
                written = stamp_fill(number, start, stop - start)
                self._of_bytes.setdefault(written, []).append(number)
        return self._of_bytes


def _drop_unseen(chunk: ChunkHistory, reads: Sequence[Op]) -> None:
    """Parse the reads, then settle writes of unknown outcome: whoever was seen took effect.

    One that nobody saw may as well never have taken effect, unless lengths are watched: it could
    have made the chunk longer.
    """
    writers = [_Writers() for _ in chunk.cuts]
    for part in chunk.writes:
        for segment in range(part.first, part.last):
            writers[segment].numbers.add(part.value)
    seen: set[int] = set()
    for op in reads:
        part = _part(chunk, op, op.offset, op.stop)
        values = _parse(chunk, op, part, writers)
        if values is not None:
            part.seen = values
            chunk.reads.append(part)
            for value in values:
                seen.update((value,) if isinstance(value, int) else value)
    sure = {v for part in chunk.reads for v in part.seen if isinstance(v, int)}
    for part in chunk.writes:
        part.required = part.required or part.value in sure
    chunk.writes = [
        part for part in chunk.writes if part.required or part.value in seen or chunk.lengths
    ]


def _parse(
    chunk: ChunkHistory, op: Op, part: Part, writers: list[_Writers]
) -> tuple[Value, ...] | None:
    values: list[Value] = []
    end = op.offset + sum(run.length for run in op.data)
    runs, at = op.data, 0
    for segment in range(part.first, part.last):
        start, stop = chunk.cuts[segment], chunk.cuts[segment + 1]
        if start >= end:
            values.append(ABSENT if chunk.lengths else ZERO)
            continue
        while runs[at].offset + runs[at].length <= start:
            at += 1
        run = runs[at]
        value = None
        if stop - start >= CELL_BYTES and run.offset + run.length >= stop:
            number = number_of(run.cell)
            value = number if number == ZERO or number in writers[segment].numbers else None
        else:
            value = _guess(runs, at, start, stop, writers[segment])
        if value is None:
            chunk.violations.append(_phantom(chunk, segment, op))
            return None
        values.append(value)
    return tuple(values)


def _guess(
    runs: tuple[Run, ...], at: int, start: int, stop: int, writers: _Writers
) -> Value | None:
    pieces = []
    while at < len(runs) and runs[at].offset < stop:
        low = max(start, runs[at].offset)
        high = min(stop, runs[at].offset + runs[at].length)
        pieces.append(Run(low, high - low, runs[at].cell))
        at += 1
    if stop - start < CELL_BYTES and all(piece.cell for piece in pieces):
        fitting = writers.of_bytes(start, stop).get(bytes_of(pieces), [])
    else:
        numbers = (ZERO, *sorted(writers.numbers))
        fitting = [n for n in numbers if all(carries(p, n) for p in pieces)]
    if len(fitting) == 1:
        return fitting[0]
    return frozenset(fitting) or None


def _phantom(chunk: ChunkHistory, segment: int, op: Op) -> Violation:
    start, stop = chunk.cuts[segment], chunk.cuts[segment + 1]
    runs = [run for run in op.data if run.offset < stop and run.offset + run.length > start]
    if len(runs) > 1:
        return Violation("torn", f"{chunk.place(segment)}: one read saw parts of several writes "
                         "inside one segment, which no write begins or ends in", (op,))  # fmt: skip
    number = number_of(runs[0].cell)
    what = f"data of write w{number}, which did not write here" if number else "foreign bytes"
    return Violation("phantom", f"{chunk.place(segment)}: a read saw {what}", (op,))
