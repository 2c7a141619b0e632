"""Every row of the comparison, and pages that end at different places."""

import random

import pytest

from emberfs.proto.ids import ChunkId, InodeId, pack_chunk_id
from emberfs.proto.storage_calls import ChunkRow, RememberedWrite
from emberfs.storage.resync import END, Transfer, common_end, compare

CHUNK = pack_chunk_id(InodeId(1), 0)


def row(version: int, pending: int = 0, length: int = 10, digest: int = 1, damaged: bool = False):
    return ChunkRow(CHUNK, version, pending, length, digest, damaged)


def gone(*sequences: int, pending: int = 0):
    """An absent chunk; each writer by its sequence."""
    writers = tuple(RememberedWrite(9, i, sequence, 1) for i, sequence in enumerate(sequences))
    return ChunkRow(CHUNK, 0, pending, 0, 0, remembered=writers)


KEEP, COPY, REMOVE = (), (Transfer(CHUNK, 10),), (Transfer(CHUNK, 0),)
BURY = REMOVE


@pytest.mark.parametrize(
    ("own", "theirs", "expected"),
    [
        (None, None, KEEP),
        (row(3), None, COPY),
        (None, row(3), REMOVE),
        (None, row(0, pending=1, length=0), REMOVE),
        (row(3), row(3), KEEP),
        (row(3), row(2), COPY),
        (row(3), row(4), COPY),  # R2: the successor is ahead
        (row(3), row(3, digest=2), COPY),  # R1: equal versions, unequal data
        (row(3), row(3, length=9), COPY),
        (row(3), row(3, pending=4), COPY),
        (row(3), row(3, damaged=True), COPY),
        (row(3, pending=4), row(3), KEEP),  # ours will be forwarded
        (row(0, pending=1, length=0), None, KEEP),
        (row(3), row(0, pending=1, length=0), COPY),
        (gone(5), None, BURY),
        (gone(5), gone(), BURY),
        (gone(5), gone(4), BURY),
        (gone(5, 6), gone(5), BURY),
        (gone(5), gone(5, 6), KEEP),  # what only they know does no harm
        (gone(5), gone(7), KEEP),
        (None, gone(5), KEEP),
        (gone(5), gone(5, pending=1), REMOVE),
        (gone(5), row(3), REMOVE),
        (row(3), gone(5), COPY),
        (gone(5, pending=1), None, BURY),
    ],
)
def test_compare(own: ChunkRow | None, theirs: ChunkRow | None, expected: tuple) -> None:
    found = compare([own] if own else [], [theirs] if theirs else [], END)
    assert found.transfers == expected
    assert found.same_bytes == (10 if expected == KEEP and own and own.length else 0)


def test_pages_of_different_reach_miss_nothing() -> None:
    source = random.Random(1)
    for _ in range(50):
        ours = make_inventory(source)
        others = make_inventory(source)
        whole = compare(list(ours.values()), list(others.values()), END)
        transfers: list[Transfer] = []
        start = b""
        while True:
            own, own_next = page(ours, start, 3)
            theirs, their_next = page(others, start, 5)
            stop = common_end(own_next, their_next)
            transfers += compare(own, theirs, stop).transfers
            if stop == END:
                break
            assert stop > start
            start = stop
        assert tuple(transfers) == whole.transfers


def make_inventory(source: random.Random) -> dict[ChunkId, ChunkRow]:
    chunks = [pack_chunk_id(InodeId(1), i) for i in range(20) if source.random() < 0.5]
    return {c: ChunkRow(c, source.randrange(1, 3), 0, 5, 0) for c in chunks}


def page(rows: dict[ChunkId, ChunkRow], start: bytes, limit: int) -> tuple[list[ChunkRow], bytes]:
    found = [rows[c] for c in sorted(rows) if c >= start]
    more = len(found) >= limit
    return found[:limit], found[limit - 1].chunk + b"\0" if more else END
