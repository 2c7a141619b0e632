"""Payloads that say who wrote them.

Write number n fills its range with one 8-byte cell, repeated, in step with the *file position*: the
byte at position p is cell[p % 8]. So any byte range tells its writer, whatever its alignment: a
whole cell gives the number back, a shorter piece is compared with the cells of the candidates.
Every byte of a cell has its top bit set, hence zeros are always "never written" and a flipped top
bit is always foreign. The 56 bits below are the number, mixed: neighbours differ in many bytes.

A payload is kept as runs: (position, length, cell), a handful of them for a megabyte.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

CELL_BYTES = 8
ZERO_CELL = bytes(CELL_BYTES)
NUMBER_MAX = (1 << 56) - 1
RUNS_MAX = 256  # of one payload; what follows is kept as one foreign run

_MASK = NUMBER_MAX
_ODD = 0x9E3779B97F4A7C15 & _MASK | 1
_INVERSE = pow(_ODD, -1, 1 << 56)


class Run(NamedTuple):
    """`length` bytes from file position `offset` on, all in step with one cell.

    A run shorter than a cell knows only its own bytes; the rest of `cell` is zero. An empty cell
    stands for bytes that are no stamps and were not kept.
    """

    offset: int
    length: int
    cell: bytes


@lru_cache(maxsize=4096)
def cell_of(number: int) -> bytes:
    """Return the cell of a write number (1 to NUMBER_MAX); 0 is a cell of zeros."""
    if number == 0:
        return ZERO_CELL
    if not 0 < number <= NUMBER_MAX:
        raise ValueError(f"write number {number} is not in 1..{NUMBER_MAX}")
    mixed = number * _ODD & _MASK
    mixed ^= mixed >> 28
    mixed = mixed * _ODD & _MASK
    return bytes(0x80 | mixed >> 7 * place & 0x7F for place in range(CELL_BYTES))


@lru_cache(maxsize=4096)
def number_of(cell: bytes) -> int | None:
    """Return the write number of a whole cell, 0 for zeros, None if it is no stamp."""
    if cell == ZERO_CELL:
        return 0
    if len(cell) != CELL_BYTES or any(byte < 0x80 for byte in cell):
        return None
    mixed = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(cell))
    mixed = mixed * _INVERSE & _MASK
    mixed ^= mixed >> 28
    return mixed * _INVERSE & _MASK or None


def stamp_fill(number: int, offset: int, length: int) -> bytes:
    """Return what write `number` puts at file positions offset .. offset + length."""
    cell = cell_of(number)
    shift = offset % CELL_BYTES
    return (cell[shift:] + cell * (length // CELL_BYTES + 1))[:length]


def _same_until(data: memoryview, start: int) -> int:
    """Return where the period of 8 bytes that begins at `start` ends."""
    size, step, at = len(data), CELL_BYTES, start
    while at + CELL_BYTES < size:  # gallop
        span = min(step, size - CELL_BYTES - at)
        if data[at : at + span] != data[at + CELL_BYTES : at + CELL_BYTES + span]:
            if span == 1:
                break
            step = span // 2
            continue
        at += span
        step = span * 2 if step >= span else step
    return at + CELL_BYTES


def runs_of(data: bytes | bytearray | memoryview, offset: int) -> tuple[Run, ...]:
    """Describe a payload that was written or read at file position `offset`."""
    view, runs, at = memoryview(data), [], 0
    while at < len(view):
        if len(runs) == RUNS_MAX:
            runs.append(Run(offset + at, len(view) - at, b""))
            break
        stop = len(view) if len(view) - at < CELL_BYTES else _same_until(view, at)
        piece = bytes(view[at : min(stop, at + CELL_BYTES)]).ljust(CELL_BYTES, b"\0")
        turn = (offset + at) % CELL_BYTES  # the cell counts from an aligned position
        cell = piece[CELL_BYTES - turn :] + piece[: CELL_BYTES - turn]
        runs.append(Run(offset + at, stop - at, cell))
        at = stop
    return tuple(runs)


def bytes_of(runs: Iterable[Run]) -> bytes:
    """Return the payload that runs describe; bytes that were not kept come back as 0x7F."""
    pieces = []
    for run in runs:
        if run.cell:
            shift = run.offset % CELL_BYTES
            whole = run.cell[shift:] + run.cell * (run.length // CELL_BYTES + 1)
            pieces.append(whole[: run.length])
        else:
            pieces.append(b"\x7f" * run.length)
    return b"".join(pieces)


def covering(runs: tuple[Run, ...], start: int, stop: int) -> Iterator[Run]:
    """Yield the parts of `runs` inside positions start .. stop."""
    for run in runs:
        low, high = max(run.offset, start), min(run.offset + run.length, stop)
        if low < high:
            yield Run(low, high - low, run.cell)


def carries(run: Run, number: int) -> bool:
    """Tell whether all bytes of a run are those of write `number` (0: zeros)."""
    cell = cell_of(number)
    if run.length >= CELL_BYTES or not run.cell:
        return run.cell == cell
    places = [(run.offset + step) % CELL_BYTES for step in range(run.length)]
    return all(run.cell[place] == cell[place] for place in places)
