"""What was acknowledged is still there: after a power cut, and after kills.

A change is certain from some instant on: after a power cut, when a flush that began after it had
ended itself ended before the cut, or when its own client has flushed it well at any time, since
that is told when something is gone (LOST, once); after kills of processes alone, when it was
acknowledged. What a later read sees may be any change that no certain one came strictly after:
newer changes that nobody flushed may or may not be there, older ones may not.
"""

from collections.abc import Iterable
from dataclasses import replace

from sim.history import Op, show_key
from sim.segments import ZERO, ChunkHistory, Part, split
from sim.violation import Violation

_CHANGES = ("write", "truncate", "remove")
LOST = "LOST"  # result of a flush: what its client had changed before is gone


def check_durable(ops: Iterable[Op], cut_ns: int, any_client: bool = True) -> list[Violation]:
    """Check the reads that began after a power cut of every machine against earlier flushes.

    `any_client`: a flush covers what others had acknowledged too (chunk writes that servers
    acknowledged); False: only the caller's own (writes that a mount may still buffer).
    """
    history = list(ops)
    certain = flushed(history, cut_ns, any_client)
    return _check(history, set(certain), cut_ns, "not durable")


def check_acknowledged(ops: Iterable[Op], after_ns: int = 0) -> list[Violation]:
    """Check all reads that began after `after_ns`: nothing acknowledged may be lost by kills."""
    history = list(ops)
    return _check(history, {op for op in history if op.ok}, after_ns, "lost")


def flushed(ops: Iterable[Op], cut_ns: int, any_client: bool = True) -> list[Op]:
    """Return the changes that a flush has made certain, or was answered for after the cut."""
    history = list(ops)
    flushes = [op for op in history if op.kind == "flush" and op.ok and op.end_ns is not None]
    early = [flush for flush in flushes if (flush.end_ns or 0) <= cut_ns]
    late = [flush for flush in flushes if (flush.end_ns or 0) > cut_ns]
    told = [op for op in history if op.kind == "flush" and op.result == LOST]
    return [
        op
        for op in history
        if op.ok
        and (
            any(_covers(flush, op, any_client) for flush in early)
            or any(
                _covers(flush, op, any_client=False)
                and not any(_tells(other, op, flush) for other in told)
                for flush in late
            )
        )
    ]


def _tells(told: Op, op: Op, flush: Op) -> bool:
    """Whether the client knew from another flush, which had the news first, that `op` is lost."""
    same = told.client == flush.client and told.key == flush.key
    return same and op.start_ns < (told.end_ns or 0) and told.start_ns < (flush.end_ns or 0)


def after_cut(ops: Iterable[Op], cut_ns: int, any_client: bool = True) -> list[Op]:
    """Return the history as check_linear has to see it from a power cut on.

    Reads before the cut are left out (check those alone); a change that was done before it and that
    no flush made certain may have been undone: its outcome becomes unknown. What counts is when its
    answer was sent: one that was on its way when the power failed arrives all the same.
    """
    history = list(ops)
    certain = set(flushed(history, cut_ns, any_client))
    seen: list[Op] = []
    for op in history:
        if op.start_ns >= cut_ns:
            seen.append(op)
        elif op.kind in _CHANGES:
            doubtful = op.ok and op not in certain and not _was_answered_since(op, cut_ns)
            seen.append(replace(op, outcome="unknown") if doubtful else op)
    return seen


def _was_answered_since(op: Op, cut_ns: int) -> bool:
    return op.answered_ns is not None and op.answered_ns > cut_ns


def _covers(flush: Op, op: Op, any_client: bool) -> bool:
    if op.kind not in _CHANGES or op.end_ns is None or op.end_ns > flush.start_ns:
        return False
    if op.key[: len(flush.key)] != flush.key or not (any_client or op.client == flush.client):
        return False
    if op.kind == "remove" or not flush.length:
        return True
    inside = flush.offset <= op.offset and op.stop <= flush.stop
    return inside if op.kind == "write" else flush.offset <= op.offset


def _check(ops: list[Op], certain: set[Op], after_ns: int, rule: str) -> list[Violation]:
    of_key: dict[tuple[int | str | bytes, ...], list[Op]] = {}
    for op in ops:
        if op.kind in _CHANGES or (op.kind == "read" and op.start_ns >= after_ns):
            of_key.setdefault(op.key, []).append(op)
    found: list[Violation] = []
    for key, some in of_key.items():
        chunk = split(key, some)
        found.extend(chunk.violations)
        found.extend(_check_chunk(chunk, certain, rule))
    return found


def _check_chunk(chunk: ChunkHistory, certain: set[Op], rule: str) -> Iterable[Violation]:
    changes = chunk.writes + chunk.erases
    for read in chunk.reads:
        for segment, value in enumerate(read.seen, read.first):
            here = [part for part in changes if part.first <= segment < part.last]
            sure = [p for p in here if p.op in certain and p.end_ns < read.start_ns]
            values = (value,) if isinstance(value, int) else sorted(value)
            if all(_overwritten(value, here, sure) for value in values):
                newest = max(sure, key=lambda part: part.start_ns)
                text = (
                    f"{chunk.place(segment)}: #{newest.op.number} {newest.op.kind} "
                    f"{show_key(newest.op.key)} is gone, something older was read"
                )
                yield Violation(rule, text, (newest.op, read.op))
                break


def _overwritten(value: int, here: list[Part], sure: list[Part]) -> bool:
    """Tell whether every change that could have left this value came before a certain other one."""
    sources = [part.end_ns for part in here if part.value == value]
    if value <= ZERO:
        sources.append(-1)  # the beginning
    return all(
        any(end_ns < part.start_ns and part.value != value for part in sure) for end_ns in sources
    )
