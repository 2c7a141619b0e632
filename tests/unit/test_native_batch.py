"""Batches of entries in bulk: the compiled loops do what their Python twins do."""

import struct
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberfs.client.native import _batch, _entries, layout
from emberfs.client.native.layout import COMPLETION, SUBMISSION
from emberfs.proto.storage_calls import ReadResult, pack_read_results, unpack_read_ops
from unit.batch_twin import (
    FILE,
    REGION,
    pack_twin,
    plan_twin,
    settle_completions_twin,
    settle_twin,
    survey_twin,
)

KiB = 1 << 10
CHUNK = 64 * KiB
REGIONS = {3: REGION.pack(77, 1 << 20), 9: REGION.pack(78, 4 * KiB)}
BYTES_MAX = 256 * KiB


def table(*chains):
    """Chains of (target, version, node)."""
    width = max(map(len, chains))
    parts = [struct.pack("<II", len(chains), width)]
    for chain in chains:
        parts.append(struct.pack("<I", len(chain)))
        parts += [struct.pack("<III", *replica) for replica in chain]
        parts.append(bytes(12 * (width - len(chain))))
    return b"".join(parts)


TABLE = table(
    [(101, 4, 0), (201, 4, 1), (301, 4, 2)], [(202, 9, 1), (102, 9, 0)], [], [(303, 1, 2)]
)
FILES = {
    1: (FILE.pack(1000, 1000, CHUNK, 10 * CHUNK + 17), TABLE),
    2: (FILE.pack(2**63 + 5, 2**62 + 1, CHUNK, 1 << 62), TABLE),
    4: (FILE.pack(7, 7, 1 << 20, 1 << 30), table([(404, 2, 3)])),
}
COSTS = struct.pack("<4I", 0, 1, 2, 0)

NUMBERS = st.sampled_from((1, 1, 1, 2, 4, 5))
OFFSETS = (
    st.integers(0, 200).map(lambda n: 4096 * n) | st.integers(0, 2**21) | st.integers(0, 2**64 - 1)
)
LENGTHS = st.sampled_from((4096, 4096, 100, CHUNK, 0, 1 << 30, (1 << 30) + 1, 2**32 - 1))
ENTRIES = st.lists(
    st.builds(
        SUBMISSION.pack,
        st.integers(0, 2**64 - 1),
        st.sampled_from((layout.READ,) * 9 + (layout.WRITE, 2, 2**32 - 1)),
        NUMBERS,
        OFFSETS,
        st.sampled_from((3, 3, 3, 9, 8)),
        LENGTHS,
        st.sampled_from((0, 0, 4096, 2**20 - 4096, 2**64 - 1)) | st.integers(0, 2**20),
        st.sampled_from((0,) * 9 + (1,)),
    ),
    max_size=60,
).map(b"".join)


@settings(max_examples=400)
@given(ENTRIES)
def test_any_batch_is_surveyed_as_the_twin_does(entries):
    assert _batch.survey(entries, REGIONS) == survey_twin(entries, REGIONS)


@settings(max_examples=400)
@given(
    ENTRIES,
    st.lists(st.sampled_from((0, 3, 9, 20, 40, 2**32 - 1)), min_size=4, max_size=4),
    st.sampled_from((0, 1, 2, 3, 2**32 - 1)),
)
def test_any_batch_is_planned_as_the_twin_does(entries, costs, turn):
    states, _ = survey_twin(entries, REGIONS)
    packed = struct.pack("<4I", *costs)
    arguments = entries, states, REGIONS, FILES, packed, BYTES_MAX, turn
    found = _batch.plan(*arguments)
    assert found == plan_twin(*arguments)
    placed = [p for call in found[0] for p in memoryview(call[3]).cast("I")]
    left = memoryview(found[1]).cast("I").tolist()
    assert sorted(placed + left) == list(range(len(states)))


@settings(max_examples=300)
@given(st.data())
def test_answers_are_settled_as_the_twin_does(data):
    count = data.draw(st.integers(0, 30))
    entry = st.builds(
        lambda u, n: SUBMISSION.pack(u, 0, 1, 0, 3, n, 0, 0), st.integers(0, 9), SIZES
    )
    entries = b"".join(data.draw(st.lists(entry, min_size=30, max_size=30)))
    places = data.draw(st.permutations(range(30)))[:count]
    result = st.builds(ReadResult, st.sampled_from((0, 0, 0, 408, -1)), SIZES, st.just(3))
    results = pack_read_results(data.draw(st.lists(result, min_size=count, max_size=count)))
    filled = data.draw(st.just([]) | st.lists(SIZES, min_size=count, max_size=count))
    packed = struct.pack(f"<{count}I", *places)
    arguments = entries, packed, results, struct.pack(f"<{len(filled)}I", *filled)
    assert _batch.settle(*arguments) == settle_twin(*arguments)


SIZES = st.sampled_from((0, 1, 4095, 4096, 4096, 4096, 5000))


def read(user_data, file, offset, length=4096, region=3, start=0):
    return SUBMISSION.pack(user_data, layout.READ, file, offset, region, length, start, 0)


def test_a_batch_becomes_one_call_for_each_node():
    """By hand: entries of three chunks of two files, one of which nobody serves."""
    entries = b"".join(
        [
            read(1, 4, 0),
            read(2, 1, 3 * CHUNK, start=4096),
            read(3, 1, 2 * CHUNK),  # nobody serves it
            read(4, 1, 7 * CHUNK + 4096, region=9),  # the same chain as chunk 3
            read(5, 1, 10 * CHUNK, 18),  # beyond the end
            read(6, 1, CHUNK - 1, 2),  # in two chunks
            read(7, 1, 10 * CHUNK, 17),
        ]
    )
    states, spans = _batch.survey(entries, REGIONS)
    assert states == bytes([1] * 7)
    assert spans == [(4, 0, 4096), (1, CHUNK - 1, 10 * CHUNK + 18)]
    calls, left = _batch.plan(entries, states, REGIONS, FILES, COSTS, BYTES_MAX, 0)
    assert memoryview(left).cast("I").tolist() == [2, 4, 5, 6]
    assert [(call[0], memoryview(call[3]).cast("I").tolist(), call[4:]) for call in calls] == [
        (3, [0], (4096, [3])),
        (2, [1, 3], (8192, [3, 9])),
    ]
    operations = unpack_read_ops(calls[1][1])
    assert [op[:2] + op[3:] for op in operations] == [(303, 1, 0, 4096, 0), (303, 1, 4096, 4096, 0)]
    assert operations[1].chunk == struct.pack(">QI", 1000, 7)


EVERYWHERE = {
    1: (
        FILE.pack(1000, 1000, CHUNK, 1 << 40),
        table(*([(100 * n + c, 1, (n + c) % 3) for n in range(3)] for c in range(3))),
    )
}


def test_few_small_reads_are_not_spread_over_many_nodes():
    def nodes(count, costs=(0, 0, 0), turn=0, length=4096):
        entries = b"".join(read(i, 1, CHUNK * i, length) for i in range(count))
        packed = struct.pack("<3I", *costs)
        arguments = entries, bytes([1] * count), REGIONS, EVERYWHERE, packed, BYTES_MAX, turn
        calls, left = _batch.plan(*arguments)
        assert (calls, left) == plan_twin(*arguments)
        return sorted({call[0] for call in calls})

    assert [nodes(20, turn=turn) for turn in range(4)] == [[0], [1], [2], [0]]
    assert nodes(95) == [0]
    assert nodes(96) == [0, 1, 2]
    assert nodes(20, length=16 << 10) == [0]
    assert set(nodes(20, length=(16 << 10) + 1)) == {0, 1, 2}
    assert nodes(20, costs=(9, 3, 0)) == [1]  # who is busy is left alone
    assert nodes(20, costs=(8, 0, 0)) == [0]
    assert nodes(1, costs=(8, 8, 8)) in ([0], [1], [2])


def test_calls_are_bounded():
    entries = b"".join(read(i, 4, 4096 * (i % 200)) for i in range(600))
    calls, left = _batch.plan(entries, bytes([1] * 600), REGIONS, FILES, COSTS, 1 << 40, 0)
    assert [len(call[3]) // 4 for call in calls] == [256, 256, 88]
    calls, left = _batch.plan(entries, bytes([1] * 600), REGIONS, FILES, COSTS, 8192, 0)
    assert {len(call[3]) // 4 for call in calls} == {2}
    calls, left = _batch.plan(entries, bytes([1] * 600), REGIONS, FILES, COSTS, 1, 0)
    assert len(calls) == 600
    assert left == b""


@pytest.mark.parametrize(
    "files",
    [
        {1: (FILE.pack(1, 1, CHUNK, 1 << 20), b"")},
        {1: (FILE.pack(1, 1, CHUNK, 1 << 20), TABLE[:20])},
        {1: (FILE.pack(1, 1, 0, 1 << 20), TABLE)},
        {1: (FILE.pack(1, 1, CHUNK, 1 << 20), struct.pack("<III", 1, 0, 5))},
        {1: (FILE.pack(1, 1, CHUNK, 1 << 20), table([(1, 1, 99)]))},
    ],
)
def test_tables_of_nonsense_plan_nothing(files):
    calls, left = _batch.plan(read(1, 1, 0), b"\1", REGIONS, files, COSTS, BYTES_MAX, 0)
    assert calls == []
    assert left == bytes(4)


def test_arguments_of_nonsense():
    entry = read(1, 1, 0)
    with pytest.raises(ValueError, match="too short"):
        _batch.survey(entry, {3: b"short"})
    with pytest.raises(ValueError, match="too short"):
        _batch.plan(entry, b"\1", REGIONS, {1: (b"", TABLE)}, COSTS, 1, 0)
    with pytest.raises(ValueError, match="one state"):
        _batch.plan(entry, b"\1\1", REGIONS, FILES, COSTS, 1, 0)
    for places, results, filled in ((1, 0, 0), (1, 1, 2), (0, 1, 0)):
        with pytest.raises(ValueError, match="as many"):
            _batch.settle(entry, bytes(4 * places), bytes(16 * results), bytes(4 * filled))
    with pytest.raises(ValueError, match="as many"):
        _batch.settle(entry, struct.pack("<I", 1), bytes(16), b"")


# ---------------------------------------------------------------- the application's end

FILES_HERE = [SimpleNamespace(number=n) for n in (1, 2, 2**32 - 1)]
REGIONS_HERE = [SimpleNamespace(id=n) for n in (5, 6)]
NUMBERS_HERE = {5: 50, 6: 60}
ANY_OFFSET = st.integers(0, 2**40) | st.integers(-(2**65), 2**65)
ANY_LENGTH = st.sampled_from((4096, 4096, 1, 0, 1 << 30, (1 << 30) + 1, 1 << 40))


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(FILES_HERE),
            ANY_OFFSET,
            st.sampled_from(REGIONS_HERE),
            st.integers(0, 2**40),
            ANY_LENGTH,
        ),
        max_size=40,
    ),
    st.integers(0, 2**32 - 1),
)
def test_entries_are_packed_as_the_twin_does(some, batch):
    wanted = [(file, offset, None) for file, offset, *_ in some]
    parts = [part for _, _, *part in some]
    arguments = wanted, [tuple(part) for part in parts], NUMBERS_HERE, 1, batch << 32
    assert _entries.pack(*arguments) == pack_twin(*arguments)


@settings(max_examples=300)
@given(
    st.lists(
        st.builds(
            COMPLETION.pack,
            st.tuples(st.sampled_from((1, 1, 2)), st.integers(0, 9)).map(
                lambda x: x[0] << 32 | x[1]
            ),
            st.integers(0, 2**40) | st.integers(-200, -1),
        ),
        max_size=40,
    ).map(b"".join)
)
def test_completions_are_noted_as_the_twin_does(completions):
    mine, twins = ({n: SimpleNamespace(results=[None] * 10) for n in (1, 2)} for _ in range(2))
    found = _entries.settle(completions, mine)
    assert found == settle_completions_twin(completions, twins)
    assert [b.results for b in mine.values()] == [b.results for b in twins.values()]


def test_what_cannot_be_an_entry_or_a_completion():
    file, region = FILES_HERE[0], REGIONS_HERE[0]
    with pytest.raises(TypeError, match="wanted for each"):
        _entries.pack([[file, 0, None]], [(region, 0, 1)], NUMBERS_HERE, 0, 0)
    with pytest.raises(TypeError):
        _entries.pack([(file, "0", None)], [(region, 0, 1)], NUMBERS_HERE, 0, 0)
    with pytest.raises(KeyError, match="5"):
        _entries.pack([(file, 0, None)], [(region, 0, 1)], {}, 0, 0)
    with pytest.raises(AttributeError):
        _entries.pack([(None, 0, None)], [(region, 0, 1)], NUMBERS_HERE, 0, 0)
    with pytest.raises(ValueError, match="one part"):
        _entries.pack([], [(region, 0, 1)], NUMBERS_HERE, 0, 0)
    with pytest.raises(KeyError):
        _entries.settle(COMPLETION.pack(3 << 32, 0), {})
    with pytest.raises(IndexError):
        _entries.settle(COMPLETION.pack(3 << 32 | 5, 0), {3: SimpleNamespace(results=[None])})
