"""Names over the lives of a metadata server: what its power cuts may take away, and what not.

Between two power cuts all calls must fit one order (check_tree.py), from what the store held at the
beginning to what it holds at the end. Whether a call whose answer nobody heard took effect is told
by the server's memory of replies, which is written together with the effect.

A power cut may undo calls, but none that a flush (stable, or a settlement that was durable) had
followed; and what is left must be explained by the calls that are left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sim.check_tree import CHANGES, ERRORS, LOOKS, Node, Place, check_tree, show
from sim.history import Op
from sim.violation import Verdict, Violation

Request = tuple[int, int]  # (client id, sequence)
FLUSH = "stable"


class Seen(NamedTuple):
    """The store at an instant: its names, and what it remembers to have answered."""

    tree: Mapping[Place, Node]
    answers: Mapping[Request, str]  # results, as check_tree knows them


class Cut(NamedTuple):
    """A power cut of the metadata server: the store before and after it."""

    at_ns: int
    before: Seen
    after: Seen


def check_lives(
    ops: Sequence[Op], requests: Mapping[int, Request], cuts: Sequence[Cut], last: Seen, end_ns: int
) -> Verdict:
    """Check the calls of a history; `requests` by number of the operation."""
    total = Verdict()
    begin_ns, initial = -1, Seen({}, {})
    for cut in (*cuts, Cut(end_ns, last, last)):
        span = _Span(ops, requests, begin_ns, cut, initial)
        parts = [check_tree(span.all(), initial.tree)]
        if cut.before is not cut.after:
            parts.append(check_tree(span.survivors(), initial.tree, "names after a power cut"))
            parts.append(Verdict(span.lost()))
        for part in parts:
            total.violations += part.violations
            total.undecided += part.undecided
            total.decided += part.decided
        begin_ns, initial = cut.at_ns, cut.after
    return total


class _Span:
    """The calls between two power cuts."""

    def __init__(
        self,
        ops: Sequence[Op],
        requests: Mapping[int, Request],
        begin_ns: int,
        cut: Cut,
        initial: Seen,
    ) -> None:
        self._ops = ops
        self._requests = requests
        self._begin_ns = begin_ns
        self._cut = cut
        self._initial = initial

    def all(self) -> list[Op]:
        """Every call that was answered or took effect here, and the tree in the end."""
        found = [op for op in map(self._placed, self._ops) if op is not None]
        return [*found, self._end(self._cut.before)]

    def survivors(self) -> list[Op]:
        """The changes that the power cut has left."""
        left = self._cut.after.answers
        found = [op for op in self.all() if self._requests.get(op.number, (0, 0)) in left]
        return [*found, self._end(self._cut.after)]

    def lost(self) -> list[Violation]:
        """Changes that a flush had made certain and that are gone."""
        cut, found = self._cut, []
        flushes = [
            op
            for op in self._ops
            if op.kind == FLUSH and op.ok and self._begin_ns < op.start_ns and self._ended(op)
        ]
        for op in self._ops:
            request = self._requests.get(op.number)
            if op.kind not in CHANGES or request not in cut.before.answers:
                continue
            flush = next((f for f in flushes if op.ok and (op.end_ns or 0) < f.start_ns), None)
            if flush is not None and self._ended(op) and request not in cut.after.answers:
                text = f"the power cut at {cut.at_ns / 1e9:.6f} s undid what was flushed"
                found.append(Violation("names not durable", text, (op, flush)))
        return found

    def _ended(self, op: Op) -> bool:
        return op.end_ns is not None and op.end_ns <= self._cut.at_ns

    def _placed(self, op: Op) -> Op | None:
        """Return the call as it is to be seen here; None if it does not belong here."""
        if op.kind not in (*CHANGES, *LOOKS):
            return None
        cut, begin_ns = self._cut, self._begin_ns
        request = self._requests.get(op.number, (0, 0))
        if request in self._initial.answers:
            return None
        answered = cut.before.answers.get(request)
        ended_here = self._ended(op) and (op.end_ns or 0) > begin_ns
        if answered is not None:
            result = op.result if op.ok and ended_here else answered
            start_ns = max(op.start_ns, begin_ns)
            end_ns = op.end_ns if ended_here else cut.at_ns
            return replace(op, outcome="ok", start_ns=start_ns, end_ns=end_ns, result=result)
        if op.outcome == "unknown" or not ended_here or op.start_ns < begin_ns:
            return None
        if op.outcome == "fail" and op.result not in ERRORS:
            return None
        return op

    def _end(self, seen: Seen) -> Op:
        at_ns = self._cut.at_ns
        return Op(-1, "tree", (), 0, 0, at_ns, at_ns, "ok", result=show(seen.tree), number=-1)
