"""Linearizability of the reads and writes of files or chunks.

Two steps for every chunk. First every segment as a register of its own (zones.py): fast, and its
explanation names the few operations concerned. Then, if that found nothing, the whole chunk: one
order of *whole* operations must explain all reads (linearize.py), which also catches a read that
saw half of a write. A search that uses up its budget is counted as undecided, never as passed.

`chunk_bytes` cuts the keys into pieces that are written atomically; None: every key is one.
`lengths` also compares how far short reads got with the length that the writes and truncations
made (exact for a chunk; the length of a file is not promised between clients).
"""

from collections.abc import Iterable, Sequence

from sim.history import FOREVER_NS, Key, Op
from sim.linearize import BUDGET_STEPS, Call, Search, linearize
from sim.segments import ABSENT, ZERO, ChunkHistory, Part, split
from sim.violation import Verdict, Violation
from sim.zones import check_zones

_SHRINK_STEPS = 2_000  # for one try to leave an operation out
_SHRINK_PARTS = 80  # explanations of longer histories are not made smaller

State = tuple[int, ...]


def check_linear(
    ops: Iterable[Op],
    chunk_bytes: int | None = None,
    lengths: bool = False,
    budget_steps: int = BUDGET_STEPS,
) -> Verdict:
    """Check all keys of a history. Other kinds than read, write, truncate, remove are ignored."""
    assert not (chunk_bytes and lengths), "lengths are exact within a chunk only"
    of_key: dict[Key, list[Op]] = {}
    for op in ops:
        if op.kind in ("read", "write", "truncate", "remove"):
            of_key.setdefault(op.key, []).append(op)
    verdict = Verdict()
    for key, of_this in of_key.items():
        for low, high in _chunks(of_this, chunk_bytes):
            _check_chunk(verdict, split(key, of_this, low, high, lengths), budget_steps)
    return verdict


def _chunks(ops: Sequence[Op], chunk_bytes: int | None) -> list[tuple[int, int]]:
    if chunk_bytes is None:
        return [(0, FOREVER_NS)]
    touched: set[int] = set()
    for op in ops:
        if op.kind == "read" and op.length:
            touched.update(range(op.offset // chunk_bytes, (op.stop - 1) // chunk_bytes + 1))
    return [(index * chunk_bytes, (index + 1) * chunk_bytes) for index in sorted(touched)]


def _check_chunk(verdict: Verdict, chunk: ChunkHistory, budget_steps: int) -> None:
    found = chunk.violations + check_zones(chunk)
    if not found and chunk.reads:
        model = ChunkModel(chunk, chunk.writes + chunk.erases + chunk.reads)
        search = model.search(budget_steps)
        if not search.decided:
            verdict.undecided.append(f"{chunk.place(0)}: {len(model.parts)} operations")
            return
        if search.order is None:
            found = [_explain(chunk, model, search)]
    verdict.decided += 1
    verdict.violations.extend(found)


class ChunkModel:
    """The state of one chunk, a value per segment, and what each operation does to it."""

    def __init__(self, chunk: ChunkHistory, parts: list[Part]) -> None:
        self.chunk = chunk
        self.parts = parts
        self.calls = [
            Call(part.start_ns, part.end_ns, part.required, bool(part.seen)) for part in parts
        ]
        # (segment, value) -> the reads that still need it, as bits.
        self._needed: dict[tuple[int, int], int] = {}
        self._erasers = [0] * len(chunk.cuts)
        for index, part in enumerate(parts):
            for segment, value in enumerate(part.seen, part.first):
                if isinstance(value, int):
                    place = segment, value
                    self._needed[place] = self._needed.get(place, 0) | 1 << index
            if not part.seen and part.value == ZERO:
                for segment in range(len(chunk.cuts) - 1):
                    self._erasers[segment] |= 1 << index

    def search(self, budget_steps: int) -> Search:
        """Look for an order of all parts."""
        start = ABSENT if self.chunk.lengths else ZERO
        empty = (start,) * (len(self.chunk.cuts) - 1)
        return linearize(self.calls, empty, self.apply, budget_steps)

    def apply(self, state: State, index: int, done: int) -> State | None:
        """Return the state after one part; None if a read does not fit or could never fit again."""
        part = self.parts[index]
        first, last = part.first, part.last
        if part.seen:
            if state[first:last] == part.seen:
                return state
            fits = all(
                have == want if isinstance(want, int) else have in want
                for have, want in zip(state[first:last], part.seen, strict=True)
            )
            return state if fits else None
        open_parts = ~(done | 1 << index)
        for segment in range(first, last):
            value = state[segment]
            if value == part.value:
                continue
            # A unique value that is overwritten does not come back; zeros do if someone erases.
            if self._needed.get((segment, value), 0) & open_parts and (
                value > ZERO or not (self._erasers[segment] & open_parts or self.chunk.lengths)
            ):
                return None
        return self._changed(state, part)

    def _changed(self, state: State, part: Part) -> State:
        first, last = part.first, part.last
        if part.value != ZERO:
            below = state[:first]
            if self.chunk.lengths and ABSENT in below:
                below = tuple(ZERO if value == ABSENT else value for value in below)
            return below + (part.value,) * (last - first) + state[last:]
        if not self.chunk.lengths:
            return state[:first] + (ZERO,) * (len(state) - first)
        below = state[:first]
        if part.op.kind == "truncate" and ABSENT in below:
            below = tuple(ZERO if value == ABSENT else value for value in below)
        return below + (ABSENT,) * (len(state) - first)


def _explain(chunk: ChunkHistory, model: ChunkModel, search: Search) -> Violation:
    parts, stuck = model.parts, [
        part.op for i, part in enumerate(model.parts) if part.seen and not search.deepest >> i & 1
    ]  # fmt: skip
    smaller = _shrink(chunk, parts) if len(parts) <= _SHRINK_PARTS else parts
    ops = {part.op.number: part.op for part in smaller}
    text = f"{chunk.place(0)[: -len(')')]} ..): no order of whole operations explains these"
    if len(smaller) > _SHRINK_PARTS:
        ops = {op.number: op for op in stuck[:_SHRINK_PARTS]}
        text += "; the best order leaves these reads out"
    return Violation("atomic", text, tuple(ops[number] for number in sorted(ops)))


def _shrink(chunk: ChunkHistory, parts: list[Part]) -> list[Part]:
    """Leave out whatever is not needed for the contradiction: reads, then unseen writes."""
    for kind in ("read", "write"):
        for part in [part for part in parts if (part.op.kind == "read") == (kind == "read")]:
            rest = [other for other in parts if other is not part]
            if kind == "write" and (chunk.lengths or part.value == ZERO or _is_seen(part, rest)):
                continue
            search = ChunkModel(chunk, rest).search(_SHRINK_STEPS)
            if search.decided and search.order is None:
                parts = rest
    return parts


def _is_seen(part: Part, others: list[Part]) -> bool:
    return any(
        part.value == value if isinstance(value, int) else part.value in value
        for other in others
        for value in other.seen
    )
