"""The circuit breaker of the KV cache, and where blocks go."""

from hypothesis import given
from hypothesis import strategies as st

from emberfs.client.kvcache.breaker import Breaker
from emberfs.client.kvcache.index import Location
from emberfs.client.kvcache.records import SLOT_BYTES, FileId
from emberfs.client.kvcache.slots import (
    GAP_BYTES_MAX,
    RUN_BYTES_MAX,
    Slots,
    file_name,
    log_name,
    parse_file,
    parse_log,
    parse_snapshot,
    runs_of,
    snapshot_name,
)


def test_failures_in_a_row_open_it_and_a_probe_closes_it() -> None:
    breaker = Breaker(3, 100, 1000)
    for _ in range(2):
        assert breaker.allows(0)
        breaker.failed(0)
    breaker.succeeded()
    for _ in range(3):
        assert breaker.allows(0)
        breaker.failed(0)
    assert breaker.is_open
    assert not breaker.allows(99)
    assert breaker.allows(100)
    assert not breaker.allows(100)  # one probe at a time
    breaker.succeeded()
    assert not breaker.is_open
    assert breaker.allows(100)


def test_pauses_double_up_to_a_bound() -> None:
    breaker = Breaker(1, 100, 350)
    now, pauses = 0, []
    for _ in range(4):
        assert breaker.allows(now)
        breaker.failed(now)
        began = now
        while not breaker.allows(now):
            now += 1
        breaker.gave_up()
        pauses.append(now - began)
    assert pauses == [100, 200, 350, 350]


def test_late_failures_of_earlier_calls_do_not_prolong_the_pause() -> None:
    breaker = Breaker(1, 100, 1000)
    assert breaker.allows(0)
    assert breaker.allows(0)
    breaker.failed(0)
    breaker.failed(90)
    assert breaker.allows(100)


def test_a_probe_that_tells_nothing_makes_way_for_another() -> None:
    breaker = Breaker(1, 100, 1000)
    breaker.failed(0)
    assert breaker.allows(100)
    breaker.gave_up()
    assert breaker.is_open
    assert breaker.allows(100)


@given(st.lists(st.integers(1, 300_000), max_size=60))
def test_slots_never_overlap(lengths: list[int]) -> None:
    slots = Slots(4 << 20, 1 << 20)
    end = 0
    for length in lengths:
        start = slots.take(length)
        if start is None:
            assert end + length + (1 << 20) > 4 << 20
            continue
        assert start >= end
        assert start % SLOT_BYTES == 0
        assert start // (1 << 20) == (start + length - 1) // (1 << 20)
        end = start + length
        assert end <= slots.end <= slots.capacity


PLACES = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 2000), st.integers(1, 200_000)), max_size=40
)


@given(PLACES)
def test_reads_cover_every_block_once(drawn: list[tuple[int, int, int]]) -> None:
    places = [
        (n, Location(FileId(1, segment), slot * SLOT_BYTES, length, 0, 0))
        for n, (segment, slot, length) in enumerate(drawn)
    ]
    seen: list[int] = []
    for run in runs_of(places):
        covered = run.start
        for position, place in run.items:
            seen.append(position)
            assert place.segment == run.segment
            assert run.start <= place.offset
            assert place.offset + place.length <= run.stop
            assert place.offset - covered <= GAP_BYTES_MAX
            covered = max(covered, place.offset + place.length)
        assert covered == run.stop
        assert run.stop - run.start <= RUN_BYTES_MAX
    assert sorted(seen) == list(range(len(drawn)))


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_names_lead_back(writer: int, number: int) -> None:
    file = FileId(writer, number)
    assert parse_file(file_name(file)) == file
    assert parse_log(log_name(file)) == file
    assert parse_snapshot(snapshot_name(writer)) == writer
    assert parse_file(log_name(file)) is None
    assert parse_log(snapshot_name(writer)) is None
    assert parse_snapshot(log_name(file)) is None
