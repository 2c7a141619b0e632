"""The index of the KV cache: the same from logs in any order, from snapshots, within its cap."""

import random

from hypothesis import given
from hypothesis import strategies as st

from emberfs.client.kvcache.index import Index
from emberfs.client.kvcache.records import (
    Batch,
    End,
    Evicted,
    FileId,
    Opened,
    Put,
    Remove,
    Sealed,
    Touched,
)

KEYS = [bytes([n]) for n in range(1, 7)]
WRITERS = (1, 2, 3)


def put(segment: FileId, *keys: bytes, at: int = 0) -> Put:
    count = len(keys)
    offsets = [at + 4096 * n for n in range(count)]
    return Put(segment, keys, offsets, [100] * count, [7] * count)


def content(index: Index) -> dict[bytes, object]:
    return {key: index.find(key) for key in KEYS if key in index}


@st.composite
def histories(draw: st.DrawFn) -> dict[int, list[Batch]]:
    """Logs of several writers, who may know of each other or not."""
    logs: dict[int, list[Batch]] = {writer: [] for writer in WRITERS}
    segments = [FileId(writer, number) for writer in WRITERS for number in (1, 2)]
    clock = dict.fromkeys(WRITERS, 0)
    at = 0
    for _ in range(draw(st.integers(1, 25))):
        writer = draw(st.sampled_from(WRITERS))
        if draw(st.booleans()):  # it has read what the others wrote
            clock[writer] = max(clock.values())
        clock[writer] += 1
        kind = draw(st.sampled_from(["put", "put", "put", "remove", "evict", "seal", "touch"]))
        keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True))
        segment = draw(st.sampled_from(segments))
        at += 4096 * 4
        message = {
            "put": put(FileId(writer, 1 + at // 4096 // 40 % 2), *keys, at=at),
            "remove": Remove(keys),
            "evict": Evicted([segment]),
            "seal": Sealed(FileId(writer, 1), at),
            "touch": Touched([segment]),
        }[kind]
        logs[writer].append(Batch(clock[writer], message))
    return logs


def applied(logs: dict[int, list[Batch]], seed: int) -> Index:
    """All logs in an order by dice; each log in its own order."""
    dice = random.Random(seed)
    index, places = Index(), dict.fromkeys(logs, 0)
    while open_logs := [w for w in logs if places[w] < len(logs[w])]:
        writer = dice.choice(open_logs)
        index.apply(writer, logs[writer][places[writer]])
        places[writer] += 1
    return index


def check_counts(index: Index) -> None:
    live: dict[FileId, int] = {}
    for key in KEYS:
        found = index.find(key)
        if found is not None:
            live[found.segment] = live.get(found.segment, 0) + 1
    for segment in index.segments():
        assert segment.live == live.pop(segment.id, 0)
    assert not live


@given(histories(), st.integers(0, 1000), st.integers(0, 1000))
def test_logs_may_be_read_in_any_order(logs: dict[int, list[Batch]], one: int, other: int) -> None:
    """Whoever reads them, in whatever order: the same blocks are found at the same places."""
    left, right = applied(logs, one), applied(logs, other)
    assert content(left) == content(right)
    assert {s.id for s in left.segments()} == {s.id for s in right.segments()}
    check_counts(left)


@given(histories(), st.integers(0, 1000))
def test_reading_a_log_twice_changes_nothing(logs: dict[int, list[Batch]], seed: int) -> None:
    index = applied(logs, seed)
    before = content(index)
    for writer, batches in logs.items():
        for batch in batches:
            index.apply(writer, batch)
    assert content(index) == before
    check_counts(index)


@given(histories(), histories(), st.integers(0, 1000))
def test_a_snapshot_is_as_good_as_the_logs(
    before: dict[int, list[Batch]], after: dict[int, list[Batch]], seed: int
) -> None:
    """What follows has the same effect on what was loaded as on what was there all the time."""
    index = applied(before, seed)
    loaded = Index()
    copy = index.copy()
    messages = [*index.dump(), End(1)]
    for message in messages:
        loaded.apply(0, Batch(index.sequence, message))
    assert content(loaded) == content(index)
    assert [s.id for s in loaded.segments()] == [s.id for s in index.segments()]
    assert loaded.total_bytes() == index.total_bytes()
    assert loaded.sequence == index.sequence
    for writer, batches in after.items():
        for batch in batches:
            index.apply(writer, batch)
            loaded.apply(writer, batch)
    assert content(loaded) == content(index)
    check_counts(loaded)
    assert [*copy.dump(), End(1)] == messages  # what came later is not in it


def test_a_removed_block_does_not_come_back_when_its_put_is_read_late() -> None:
    index = Index()
    index.apply(2, Batch(6, Remove([b"k"])))
    index.end_round()
    index.apply(1, Batch(5, put(FileId(1, 1), b"k")))
    assert b"k" not in index
    index.apply(1, Batch(7, put(FileId(1, 1), b"k", at=8192)))
    assert b"k" in index


def test_graves_are_forgotten_after_two_rounds() -> None:
    """A round that began after the removal has read every put that the remover knew of."""
    index = Index()
    index.apply(2, Batch(6, Remove([b"k"])))
    index.end_round()
    index.end_round()
    assert not [message for message in index.dump() if type(message).__name__ == "Graves"]


def test_what_an_evicted_block_had_replaced_stays_away() -> None:
    old, new = FileId(1, 1), FileId(1, 2)
    for order in ("put first", "eviction first"):
        index = Index()
        late = [Batch(5, put(old, b"k")), Batch(6, put(new, b"k"))]
        if order == "put first":
            index.apply(1, late.pop())
        index.apply(2, Batch(7, Evicted([new])))
        for batch in late:
            index.apply(1, batch)
        assert b"k" not in index, order


def filled(sizes: dict[FileId, int], capacity: int = 100_000) -> Index:
    index = Index()
    for number, (segment, size) in enumerate(sizes.items()):
        index.apply(segment.writer, Batch(3 * number + 1, Opened(segment, capacity)))
        index.apply(segment.writer, Batch(3 * number + 2, put(segment, bytes([number + 1]))))
        if size:
            index.apply(segment.writer, Batch(3 * number + 3, Sealed(segment, size)))
    return index


def test_the_least_recently_used_segments_make_room() -> None:
    a, b, c = (FileId(1, n) for n in (1, 2, 3))
    index = filled({a: 40_000, b: 30_000, c: 0})
    assert index.total_bytes() == 40_000 + 30_000 + 100_000  # c may still be filled
    assert index.victims(170_000, set()) == []
    assert index.victims(169_999, set()) == [a]
    assert index.victims(129_999, set()) == [a, b]
    index.apply(9, Batch(50, Touched([a])))  # another process has read from it
    assert index.victims(169_999, set()) == [b]
    assert index.victims(100_000, {c}) == [b, a]
    assert index.victims(0, {c}) == [b, a]  # what is being filled here stays
    index.apply(9, Batch(60, Remove([bytes([1])])))
    assert index.victims(169_999, set()) == [a]  # nothing is left in it


def test_an_evicted_segment_takes_its_blocks_and_no_others() -> None:
    a, b = FileId(1, 1), FileId(1, 2)
    index = Index()
    index.apply(1, Batch(1, put(a, b"1", b"2", b"3")))
    index.apply(1, Batch(2, put(b, b"2")))
    index.apply(7, Batch(3, Evicted([a])))
    assert b"1" not in index
    assert b"3" not in index
    found = index.find(b"2")
    assert found is not None
    assert found.segment == b
    assert index.is_dead(a)
    index.apply(1, Batch(4, put(a, b"4")))  # its writer has not heard of it yet
    assert b"4" not in index
    assert len(index) == 1
