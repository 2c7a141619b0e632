"""What clients did and saw: the only thing that the checkers look at.

An operation has an interval: it took effect, if at all, at one instant between `start_ns` and
`end_ns`. Outcomes:

    ok       it returned and took effect
    fail     it certainly did not take effect and never will
    unknown  nobody knows: it may take effect at any time after its start, or never

An operation that never returned has no end and is unknown. Kinds (the key names a file or a chunk):

    write    offset, length, data       bytes from `runs_of(stamp_fill(...))`
    read     offset, length, data       what came back; shorter than `length` at the end of the file
    truncate offset                     the new size
    remove                              all bytes
    flush    offset, length             0, 0: everything below the key, which may be a prefix
    append   length, data               the caller does not learn where

Other kinds (namespace operations) use `key` for their names and `result` for what they saw.

Times of one History rise strictly with every event, by a nanosecond where the clock stands still:
the order in which a single-threaded recorder saw the events is itself knowledge.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from sim.stamps import Run, bytes_of, number_of, runs_of

OUTCOMES = ("ok", "fail", "unknown")
FOREVER_NS = 1 << 62

Key = tuple[int | str | bytes, ...]


@dataclass(slots=True, eq=False)
class Op:
    """One operation of one client."""

    client: int
    kind: str
    key: Key
    offset: int = 0
    length: int = 0
    start_ns: int = 0
    end_ns: int | None = None
    outcome: str = "unknown"
    data: tuple[Run, ...] = ()
    stamp: int = 0  # number of a write, 0 otherwise
    result: str = ""  # what it saw: an error's name, a stat in words
    number: int = 0  # place in its history
    answered_ns: int | None = None  # when the first answer to it was *sent*, where that is known

    def heard(self, sent_ns: int) -> None:
        """Note that an answer has come; it may have been on its way for long."""
        if self.end_ns is None:
            self.answered_ns = min(sent_ns, self.answered_ns or sent_ns)

    @property
    def ok(self) -> bool:
        """It took effect."""
        return self.outcome == "ok"

    @property
    def stop(self) -> int:
        """Return the position behind the last byte that was asked for."""
        return self.offset + self.length

    @property
    def effect_by_ns(self) -> int:
        """Return the latest instant of its effect."""
        return self.end_ns if self.end_ns is not None and self.ok else FOREVER_NS

    @property
    def payload(self) -> bytes:
        """Return the bytes that it wrote or read."""
        return bytes_of(self.data)

    def saw(self) -> str:
        """Say in words what the data is."""
        words = []
        for run in self.data[:6]:
            number = number_of(run.cell) if run.length >= 8 else None
            name = {None: f"bytes {run.cell.hex()}", 0: "zeros"}.get(number, f"w{number}")
            words.append(f"{name}@{run.offset}+{run.length}")
        return " ".join(words) + (" ..." if len(self.data) > 6 else "")

    def __str__(self) -> str:
        end = "never" if self.end_ns is None else f"{self.end_ns / 1e9:.9f}"
        words = [f"#{self.number} client {self.client} {self.kind} {show_key(self.key)}"]
        if self.kind in ("write", "read", "append", "flush"):
            words.append(f"[{self.offset}, {self.stop})")
        elif self.kind == "truncate":
            words.append(f"to {self.offset}")
        words.append(f"{self.start_ns / 1e9:.9f} .. {end} s {self.outcome}")
        if self.data:
            words.append(self.saw())
        if self.result:
            words.append(f"-> {self.result}")
        return " ".join(words)


# Whom the network tells when it delivers an answer to this task: see Op.heard.
PERFORMED: ContextVar[Op | None] = ContextVar("PERFORMED", default=None)


def show_key(key: Key) -> str:
    """Return a key as a reader wants to see it."""
    return "/".join(part.hex() if isinstance(part, bytes) else str(part) for part in key) or "*"


class History:
    """A recorder. Not thread-safe: one per process; merge the files of several."""

    def __init__(self, ops: Iterable[Op] = (), sink: Callable[[str], object] | None = None) -> None:
        """`sink` gets a line at every begin and end: a killed process leaves its history."""
        self.ops: list[Op] = []
        self._sink = sink
        self._now_ns = -1
        self._stamp = 0
        for op in ops:
            self.add(op)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def __len__(self) -> int:
        return len(self.ops)

    def add(self, op: Op) -> Op:
        """Take an operation that was recorded elsewhere."""
        op.number = len(self.ops)
        self.ops.append(op)
        self._stamp = max(self._stamp, op.stamp)
        self._now_ns = max(self._now_ns, op.start_ns, op.end_ns or 0)
        return op

    def next_stamp(self) -> int:
        """Return a write number that was never given before."""
        self._stamp += 1
        return self._stamp

    def begin(
        self,
        client: int,
        kind: str,
        key: Key,
        offset: int,
        length: int,
        now_ns: int,
        data: bytes = b"",
        stamp: int = 0,
    ) -> Op:
        """Record a call. A write shorter than 8 bytes must name its `stamp`.

        The calling task performs it; another one that does sets PERFORMED itself.
        Raises ValueError if the payload of a write is not one stamp.
        """
        runs = runs_of(data, offset)
        if kind in ("write", "append") and not stamp and length:
            stamp = number_of(runs[0].cell) or 0 if len(runs) == 1 else 0
            if not stamp:
                raise ValueError("a write fills its range with stamp_fill of one write number")
        op = Op(client, kind, key, offset, length, self._tick(now_ns), None, "unknown", runs, stamp)
        op.number = len(self.ops)
        self.ops.append(op)
        self._stamp = max(self._stamp, stamp)
        PERFORMED.set(op)
        self._emit(op)
        return op

    def moved(self, op: Op, offset: int) -> None:
        """Note that a write went elsewhere than was foreseen: there it is another stamp."""
        if offset != op.offset:
            op.data, op.offset = runs_of(op.payload, offset), offset
            op.stamp = number_of(op.data[0].cell) or 0

    def end(
        self, op: Op, now_ns: int, outcome: str, data: bytes = b"", *, result: str = ""
    ) -> None:
        """Record the return of a call; `data` is what a read saw."""
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome {outcome!r} is not one of {OUTCOMES}")
        op.end_ns, op.outcome, op.result = self._tick(now_ns), outcome, result
        if op.kind == "read":
            op.data = runs_of(data, op.offset)
        self._emit(op)

    def _emit(self, op: Op) -> None:
        if self._sink is not None:
            self._sink(json.dumps(_to_plain(op), separators=(",", ":")) + "\n")

    def _tick(self, now_ns: int) -> int:
        self._now_ns = max(now_ns, self._now_ns + 1)
        return self._now_ns

    def lines(self) -> Iterator[str]:
        """Yield the history as JSON, an operation a line, in the order of begin."""
        for op in self.ops:
            yield json.dumps(_to_plain(op), separators=(",", ":"))

    def dump(self, path: Path) -> None:
        """Write a JSON-lines file."""
        path.write_text("".join(line + "\n" for line in self.lines()))

    def digest(self) -> str:
        """Return a name for exactly this history: equal runs have equal digests."""
        state = blake2b(digest_size=16)
        for line in self.lines():
            state.update(line.encode() + b"\n")
        return state.hexdigest()

    def tail(self, count: int) -> list[str]:
        """Return the operations of the last events in words, oldest first."""
        last = sorted(self.ops, key=lambda op: (max(op.start_ns, op.end_ns or 0), op.number))
        return [str(op) for op in last[-count:]]


def load(paths: Iterable[Path]) -> History:
    """Read JSON-lines files (of several processes on one clock) as one history.

    A later line about the same operation replaces an earlier one. A last line that was torn by a
    kill is left out. Raises ValueError for any other bad line.
    """
    ops: list[Op] = []
    for path in paths:
        lines = path.read_text().split("\n")
        of_file: dict[int, Op] = {}
        for place, line in enumerate(lines):
            try:
                op = _from_plain(json.loads(line))
                of_file[op.number] = op
            except (ValueError, KeyError) as problem:
                if place < len(lines) - 1:
                    raise ValueError(f"{path.name}:{place + 1}: {problem}") from None
        ops.extend(of_file.values())
    return History(sorted(ops, key=lambda op: (op.start_ns, op.client, op.number)))


def _to_plain(op: Op) -> dict[str, Any]:
    return {
        "client": op.client,
        "kind": op.kind,
        "key": [{"hex": part.hex()} if isinstance(part, bytes) else part for part in op.key],
        "offset": op.offset,
        "length": op.length,
        "start": op.start_ns,
        "end": op.end_ns,
        "outcome": op.outcome,
        "data": [[run.offset, run.length, run.cell.hex()] for run in op.data],
        "stamp": op.stamp,
        "result": op.result,
        "number": op.number,
        "answered": op.answered_ns,
    }


def _from_plain(plain: dict[str, Any]) -> Op:
    key = tuple(bytes.fromhex(p["hex"]) if isinstance(p, dict) else p for p in plain["key"])
    data = tuple(Run(at, length, bytes.fromhex(cell)) for at, length, cell in plain["data"])
    return Op(
        plain["client"], plain["kind"], key, plain["offset"], plain["length"], plain["start"],
        plain["end"], plain["outcome"], data, plain["stamp"], plain["result"], plain["number"],
        plain["answered"],
    )  # fmt: skip
