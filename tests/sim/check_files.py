"""Contents of files: close-to-open between clients, all within one, durable what was flushed.

Each file has one writer at a time (a later life of the same client, or its successor, may follow).
A change is *certain* for a read, which then must not show anything older in its place, when it was
acknowledged and
- the same client made it before the read began; or
- that client flushed it (fsync, close) before the reader opened the file; or
- it was written through (direct) before the reader opened the file: then its bytes are certain, but
  the length of the file is told later, so only as far as the read came.
A truncation is told at once. What a client has not flushed may reach the servers at any time, or
never if it is killed: it comes before a change of another client only if it was flushed before.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from emberfs.proto.ids import CHUNK_BYTES_MIN
from sim.history import Op
from sim.segments import ZERO, ChunkHistory, Part, split
from sim.violation import Violation

NEVER = 1 << 62


class Via(Protocol):
    """How an operation was made: see files_load.Via."""

    @property
    def life(self) -> int:
        """Number of the client process."""
        ...

    @property
    def opened(self) -> int:
        """Number of the operation that opened the file."""
        ...

    @property
    def direct(self) -> bool:
        """Bypassing the buffers."""
        ...


def check_files(
    ops: Iterable[Op],
    via: Mapping[int, Via],
    settled_from: int = NEVER,
    cut_ns: int = 0,
    meta_cuts_ns: Sequence[int] = (),
) -> list[Violation]:
    """Check all files. Clients from number `settled_from` on read when every length is settled.

    `cut_ns`: when the power of everything but the clients failed; what was not flushed may be gone,
    unless a later flush of the same client has ended well: then it would have said so.
    `meta_cuts_ns`: when that of the metadata server did; it may have lost that a file grew.
    """
    of_file: dict[int, list[Op]] = {}
    opens: dict[int, Op] = {}
    for op in ops:
        if op.key and op.key[0] == "file":
            inode = op.key[1]
            assert isinstance(inode, int)
            of_file.setdefault(inode, []).append(op)
            if op.kind == "open":
                opens[op.number] = op
    found: list[Violation] = []
    for inode, some in of_file.items():
        found += _File(inode, some, via, opens, settled_from, cut_ns, meta_cuts_ns).check()
    return found


class _File:
    def __init__(
        self,
        inode: int,
        ops: list[Op],
        via: Mapping[int, Via],
        opens: Mapping[int, Op],
        settled_from: int,
        cut_ns: int,
        meta_cuts_ns: Sequence[int],
    ) -> None:
        self._ops = ops
        self._via = via
        self._opens = opens
        self._settled_from = settled_from
        self._cut_ns = cut_ns
        self._meta_cuts_ns = meta_cuts_ns
        # Chunk by chunk: a write of several is not atomic.
        ends = [op.stop for op in ops if op.kind == "read"]
        self._chunks: list[ChunkHistory] = [
            split(("file", inode), ops, low, low + CHUNK_BYTES_MIN)
            for low in range(0, max(ends, default=0), CHUNK_BYTES_MIN)
        ]
        self._flushes = [op for op in ops if op.kind == "flush" and op.ok]
        self._flushed_ns: dict[int, int] = {}

    def check(self) -> Iterable[Violation]:
        """Yield what is wrong with this file."""
        for chunk in self._chunks:
            yield from chunk.violations
            for read in chunk.reads:
                yield from self._check_bytes(chunk, read)
        for op in self._ops:
            if op.kind == "read" and op.ok:
                yield from self._check_length(op)

    # ------------------------------------------------------------ bytes

    def _check_bytes(self, chunk: ChunkHistory, read: Part) -> Iterable[Violation]:
        changes = chunk.writes + chunk.erases
        end = read.op.offset + sum(run.length for run in read.op.data)
        for segment, value in enumerate(read.seen, read.first):
            here = [part for part in changes if part.first <= segment < part.last]
            short = chunk.cuts[segment] >= end
            sure = [part for part in here if self._is_certain(part, read.op, short)]
            values = (value,) if isinstance(value, int) else sorted(value)
            if all(self._overwritten(value, here, sure) for value in values):
                newest = max(sure, key=lambda part: part.start_ns)
                text = (
                    f"{chunk.place(segment)}: #{newest.op.number} {newest.op.kind} is "
                    f"{'behind the end' if short else 'gone, something older was read'}"
                )
                yield Violation("file content", text, self._story(newest.op, read.op))
                return
            if not any(
                source.start_ns < read.op.effect_by_ns
                for value in values
                for source in here
                if source.value == value
            ) and all(value > 0 for value in values):
                text = f"{chunk.place(segment)}: read before it was written"
                yield Violation("file content", text, (read.op,))
                return

    def _overwritten(self, value: int, here: list[Part], sure: list[Part]) -> bool:
        """Tell whether every change that could have left this value came before a certain one."""
        sources = [part for part in here if part.value == value]
        beginning = value <= ZERO and not any(part.value != value for part in sure)
        return not beginning and not any(
            all(part.value == value or not self._precedes(s.op, part.op) for part in sure)
            for s in sources
        )

    def _precedes(self, change: Op, other: Op) -> bool:
        if not change.ok or change.end_ns is None:
            return False
        made = self._via[change.number]
        buffered = change.kind == "write" and not made.direct
        if buffered and made.life != self._via[other.number].life:
            return self._flushed(change) < other.start_ns
        return change.end_ns < other.start_ns

    def _is_certain(self, part: Part, read: Op, short: bool) -> bool:
        change = part.op
        if not change.ok or change.end_ns is None:
            return False
        if self._may_be_undone(change, read):
            return False
        made, seen = self._via[change.number], self._via[read.number]
        if made.life == seen.life and change.end_ns < read.start_ns:
            return True
        opened_ns = self._opens[seen.opened].start_ns
        if change.end_ns >= opened_ns:
            return False
        if change.kind == "truncate" or self._flushed(change) < opened_ns:
            return True
        return made.direct and (not short or read.client >= self._settled_from)

    def _may_be_undone(self, change: Op, read: Op) -> bool:
        cut_ns = self._cut_ns
        if not change.start_ns < cut_ns < read.effect_by_ns or self._flushed(change) <= cut_ns:
            return False
        return change.kind != "write" or not self._is_answered_for(change)

    def _is_answered_for(self, change: Op) -> bool:
        """Tell whether its client has flushed it well since; a loss fails the first flush, once."""
        life, at_ns, end_ns = self._via[change.number].life, self._flushed(change), change.end_ns
        return at_ns < NEVER and not any(
            op.kind == "flush"
            and not op.ok
            and self._via[op.number].life == life
            and op.start_ns < at_ns
            and (op.end_ns or NEVER) > (end_ns or 0)
            for op in self._ops
        )

    def _may_be_forgotten(self, change: Op, read: Op) -> bool:
        if change.kind != "truncate":
            return False
        until_ns = min(read.effect_by_ns, self._flushed(change))
        return any(change.start_ns < at_ns < until_ns for at_ns in self._meta_cuts_ns)

    def _flushed(self, change: Op) -> int:
        """When a flush of the same client that began after the change had ended; or never."""
        known = self._flushed_ns.get(change.number)
        if known is None:
            life, end_ns = self._via[change.number].life, change.end_ns or 0
            known = min(
                (
                    flush.end_ns or 0
                    for flush in self._flushes
                    if flush.start_ns > end_ns and self._via[flush.number].life == life
                ),
                default=NEVER,
            )
            self._flushed_ns[change.number] = known
        return known

    def _story(self, change: Op, read: Op) -> tuple[Op, ...]:
        opened = self._opens[self._via[read.number].opened]
        near = [
            op
            for op in self._ops
            if op.kind in ("write", "truncate", "flush", "open")
            and change.start_ns <= op.start_ns <= read.effect_by_ns
        ]
        return tuple(dict.fromkeys((change, opened, *near[:20], read)))

    # ------------------------------------------------------------ lengths

    def _check_length(self, read: Op) -> Iterable[Violation]:
        end = read.offset + sum(run.length for run in read.data)
        changes = [
            op
            for op in self._ops
            if op.kind in ("write", "truncate")
            and op.outcome != "fail"
            and op.start_ns < read.effect_by_ns
        ]
        most = max((op.stop for op in changes), default=0)
        if read.data and end > most:
            text = f"a read reached {end}, the file was never longer than {most}"
            yield Violation("file length", text, (read,))
        life = self._via[read.number].life
        if not all(
            not self._may_be_undone(op, read)
            and not self._may_be_forgotten(op, read)
            and op.ok
            and self._via[op.number].life == life
            and (op.end_ns or 0) < read.start_ns
            for op in changes
        ):
            return
        length = 0
        for op in changes:
            length = op.offset if op.kind == "truncate" else max(length, op.stop)
        if end != max(read.offset, min(read.stop, length)):
            text = f"its writer saw the end at {end}, it was at {length}"
            yield Violation("file length", text, (*changes[-6:], read))
