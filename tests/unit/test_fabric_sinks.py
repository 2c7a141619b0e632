"""Descriptors of sinks in bulk: the compiled survey says what its Python twin says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberfs.fabric.frame import pack_descriptors
from emberfs.fabric.region import Region
from emberfs.fabric.sinks import PackedSinks, SinkTable, survey, survey_twin

REGIONS = {1: memoryview(bytearray(100)), 7: memoryview(bytearray(5000)), 1 << 31: memoryview(b"")}
U32 = st.integers(0, 2**32 - 1)
SINK = st.tuples(
    st.sampled_from((0, 0, 1, 7, 7, 1 << 31, 9)),
    st.integers(0, 6000) | st.integers(0, 2**64 - 1),
    st.integers(0, 6000) | U32,
)


@settings(max_examples=300)
@given(st.lists(SINK, max_size=40))
def test_the_survey_is_its_twin_s(sinks: list[tuple[int, int, int]]) -> None:
    packed = pack_descriptors([field for one in sinks for field in one]) if sinks else b""
    assert survey(packed, REGIONS) == survey_twin(packed, REGIONS)


def test_what_lies_outside_is_found() -> None:
    for region, offset, size in ((7, 4999, 2), (7, 2**64 - 1, 2), (3, 0, 0), (1, 101, 0)):
        packed = pack_descriptors([7, 0, 10, 0, 0, 5, region, offset, size])
        assert survey(packed, REGIONS)[2] == 2
    assert survey(pack_descriptors([7, 4999, 1, 1, 100, 0]), REGIONS)[2] == -1


def test_views_of_a_table() -> None:
    streamed = memoryview(bytearray(range(30)))
    packed = pack_descriptors([0, 0, 10, 7, 40, 3, 0, 0, 20])
    table = SinkTable(packed, REGIONS, streamed)
    assert table.number == 3
    first, second, third = table.views()
    second[:] = b"abc"
    assert bytes(REGIONS[7][40:43]) == b"abc"
    assert (bytes(first), bytes(third)) == (bytes(range(10)), bytes(range(10, 30)))
    mine = [memoryview(bytearray(3)), memoryview(bytearray(0))]
    assert SinkTable.of(mine).views() == mine
    with pytest.raises(KeyError):
        SinkTable(packed, {}, streamed).views()


def test_packed_sinks_one_by_one() -> None:
    region = Region(8192)
    try:
        packed = PackedSinks(pack_descriptors([region.id, 4, 5, region.id, 4096, 10]), 15, [region])
        assert packed.number == 2
        assert packed.slices() == [region.slice(4, 5), region.slice(4096, 10)]
    finally:
        region.close()
