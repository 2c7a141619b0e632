"""Histories of an atomic chunk, with known truth, for the tests of the checkers.

Every operation gets an interval and, inside it, one instant at which it takes effect on a plain
bytearray. So the history is linearizable by construction, also where an outcome is unknown.
"""

from dataclasses import dataclass
from random import Random

from sim.history import History, Op
from sim.stamps import CELL_BYTES, runs_of, stamp_fill


@dataclass(frozen=True, slots=True)
class Shape:
    """How a random history looks."""

    ops: int = 60
    clients: int = 4
    size_bytes: int = 256
    unit_bytes: int = 32  # offsets and lengths are multiples
    unknown: float = 0.1  # share of writes whose outcome nobody learns
    erases: float = 0.0  # share of truncates and removes
    reads: float = 0.5
    lengths: bool = False  # reads are short at the end of the chunk
    pause_ns: int = 40  # at most, between two operations of a client
    span_ns: int = 100  # at most, of an operation


def make(random: Random, shape: Shape, key: tuple[str, ...] = ("f",)) -> list[Op]:
    """Return a linearizable history."""
    ops = [op for client in range(shape.clients) for op in _plan(random, shape, client, key)]
    _execute(random, shape, ops)
    return list(History(sorted(ops, key=lambda op: op.start_ns)))


def _plan(random: Random, shape: Shape, client: int, key: tuple[str, ...]) -> list[Op]:
    now_ns, ops = random.randrange(shape.span_ns), []
    units = shape.size_bytes // shape.unit_bytes
    for step in range(shape.ops // shape.clients):
        first = random.randrange(units)
        last = random.randint(first + 1, units)
        start_ns = now_ns + random.randrange(1, shape.pause_ns)
        now_ns = start_ns + random.randrange(1, shape.span_ns)
        kind = "read" if random.random() < shape.reads else "write"
        if random.random() < shape.erases:
            kind = random.choice(("truncate", "remove"))
        offset = 0 if kind == "remove" else first * shape.unit_bytes
        length = (last - first) * shape.unit_bytes if kind in ("read", "write") else 0
        op = Op(client, kind, key, offset, length, start_ns, now_ns, "ok")
        if kind == "write":
            op.stamp = 1 + step * shape.clients + client
        if kind != "read" and random.random() < shape.unknown:
            op.outcome = "unknown"
            op.end_ns = random.choice((op.end_ns, None))
        ops.append(op)
    return ops


def _execute(random: Random, shape: Shape, ops: list[Op]) -> None:
    instants = []
    for order, op in enumerate(ops):
        if op.ok:
            assert op.end_ns is not None
            instants.append((random.randint(op.start_ns, op.end_ns), order, op))
        elif random.random() < 0.6:
            instants.append((op.start_ns + random.randrange(10 * shape.span_ns), order, op))
        if op.kind == "write":
            op.data = runs_of(stamp_fill(op.stamp, op.offset, op.length), op.offset)
    chunk = bytearray()
    for _, _, op in sorted(instants, key=lambda item: item[:2]):
        _apply(shape, chunk, op)


def _apply(shape: Shape, chunk: bytearray, op: Op) -> None:
    if op.kind == "read":
        data = bytes(chunk[op.offset : op.stop])
        if not shape.lengths:
            data = data.ljust(op.length, b"\0")
        op.data = runs_of(data, op.offset)
    elif op.kind == "remove":
        chunk.clear()
    else:
        chunk.extend(bytes(max(0, (op.stop if op.kind == "write" else op.offset) - len(chunk))))
        if op.kind == "write":
            chunk[op.offset : op.stop] = stamp_fill(op.stamp, op.offset, op.length)
        else:
            del chunk[op.offset :]


def overwrite_seen(op: Op, position: int, length: int, number: int) -> None:
    """Mutation: let a read have seen write `number` (0: zeros) at some positions."""
    data = bytearray(op.payload)
    low, high = position - op.offset, min(position - op.offset + length, len(data))
    data[low:high] = stamp_fill(number, position, high - low) if number else bytes(high - low)
    op.data = runs_of(bytes(data), op.offset)


assert CELL_BYTES == 8
