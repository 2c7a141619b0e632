"""The content of an inline file in a client: ranges, settlements, what others write meanwhile."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from emberfs.client.inline import InlineContent, Ranges
from emberfs.proto.inline import first_version_of

LIFE, NEXT_LIFE = first_version_of(3), first_version_of(4)
BYTES = 40


def text(data: InlineContent, length: int) -> bytes:
    sink = memoryview(bytearray(b"\xee" * length))
    data.read(0, sink)
    return bytes(sink)


def put(data: InlineContent, offset: int, written: bytes) -> None:
    data.write(offset, memoryview(written), 1)


@given(st.lists(st.tuples(st.integers(0, BYTES), st.integers(1, 9))), st.integers(0, BYTES))
def test_ranges_are_the_bytes_that_were_added(added: list[tuple[int, int]], cut: int) -> None:
    ranges, wanted = Ranges(), set()
    for start, length in added:
        ranges.add(start, start + length)
        wanted |= set(range(start, start + length))
    ranges.cut(cut)
    wanted = {at for at in wanted if at < cut}
    assert {at for start, stop in ranges for at in range(start, stop)} == wanted
    assert ranges.stop == max(wanted, default=-1) + 1
    pairs = list(ranges)
    assert all(a[1] < b[0] for a, b in pairwise(pairs))


def test_behind_the_content_are_zeros() -> None:
    data = InlineContent(1, b"ab", 100)
    put(data, 5, b"c")
    assert text(data, 8) == b"ab\0\0\0c\0\0"


def test_own_writes_lie_over_what_another_client_has_written() -> None:
    data = InlineContent(LIFE, b"oooooooo", 100)
    put(data, 1, b"11")
    data.newest = LIFE + 1
    assert data.outdated
    data.adopt(LIFE + 1, b"2222")
    assert (text(data, 6), data.outdated, data.unsettled) == (b"2112\0\0", False, True)


def test_a_settlement_that_fails_is_told_again() -> None:
    data = InlineContent(LIFE, b"", 100)
    put(data, 0, b"a")
    assert data.begin() == b"a"
    put(data, 1, b"b")
    data.fail()
    assert list(data.dirty) == [(0, 2)]
    data.begin()
    data.succeed(LIFE + 1, durable=False)
    assert (data.unsettled, data.unstable) == (False, True)
    data.begin()
    data.succeed(LIFE + 2, durable=True)
    assert not data.unstable


def test_what_was_told_is_told_again_only_if_a_power_cut_may_have_taken_it() -> None:
    for version, wanted in ((LIFE + 2, b"2o"), (NEXT_LIFE, b"1o")):
        data = InlineContent(LIFE, b"oo", 100)
        put(data, 0, b"1")
        data.begin()
        data.succeed(LIFE + 1, durable=False)
        data.adopt(version, b"2o")
        assert text(data, 2) == wanted
        assert [bytes(part) for _, part in data.leave(version)] == [b"1"] * (version == NEXT_LIFE)


def test_a_cut_takes_own_writes_with_it() -> None:
    data = InlineContent(LIFE, b"oooo", 100)
    put(data, 2, b"1111")
    data.cut(LIFE + 1, 3)
    assert (list(data.dirty), text(data, 5), data.outdated) == ([(2, 3)], b"oo1\0\0", True)
    data.cut(LIFE + 2, 0)
    assert (data.unsettled, data.unstable, data.outdated) == (False, True, False)


def test_what_nobody_tells_is_not_shown() -> None:
    data = InlineContent(LIFE, b"", 100)
    put(data, 0, b"a")
    data.lose()
    assert (data.unstable, data.outdated) == (False, True)


def test_beyond_the_limit_and_while_chunks_are_made_nothing_is_taken() -> None:
    data = InlineContent(LIFE, b"", 100)
    assert (data.takes(100), data.takes(101)) == (True, False)
    data.leaving = True
    assert not data.takes(1)
