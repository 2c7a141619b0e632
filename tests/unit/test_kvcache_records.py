"""Records of the KV cache: whole batches or nothing, whatever is done to their bytes."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from emberfs.client.kvcache import records as rec
from emberfs.client.kvcache.reading import checksum_of
from emberfs.client.kvcache.records import Batch, FileId

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
KEY = st.binary(min_size=1, max_size=rec.KEY_BYTES_MAX)
FILE = st.builds(FileId, U64, U32)
ORDER = st.integers(0, 2**128 - 1)


@st.composite
def puts(draw: st.DrawFn) -> rec.Put:
    keys = draw(st.lists(KEY, max_size=6))
    column = st.lists(U32, min_size=len(keys), max_size=len(keys))
    offsets = [slot * rec.SLOT_BYTES for slot in draw(column)]
    return rec.Put(draw(FILE), keys, offsets, draw(column), draw(column))


@st.composite
def entries(draw: st.DrawFn) -> rec.Entries:
    put = draw(puts())
    count = len(put.keys)
    return rec.Entries(put, draw(st.lists(ORDER, min_size=count, max_size=count)))


@st.composite
def graves(draw: st.DrawFn) -> rec.Graves:
    keys = draw(st.lists(KEY, max_size=6))
    return rec.Graves(keys, draw(st.lists(ORDER, min_size=len(keys), max_size=len(keys))))


MESSAGES = st.one_of(
    puts(),
    entries(),
    graves(),
    st.builds(rec.Remove, st.lists(KEY, max_size=6)),
    st.builds(rec.Opened, FILE, U64),
    st.builds(rec.Sealed, FILE, U64),
    st.builds(rec.Evicted, st.lists(FILE, max_size=4)),
    st.builds(rec.Touched, st.lists(FILE, max_size=4)),
    st.just(rec.Alive()),
    st.builds(rec.End, U32),
    st.builds(rec.Covered, st.lists(st.tuples(FILE, U64), max_size=4)),
    st.builds(rec.SegmentState, FILE, U64, U64, st.booleans()),
)
SEQUENCES = st.lists(st.builds(Batch, U64, MESSAGES), min_size=1, max_size=5)


def plain(value: object) -> object:
    """Columns as lists, so that what was packed equals what is unpacked."""
    if isinstance(value, tuple | list):
        kind = type(value).__name__ if hasattr(value, "_fields") else ""
        return [kind, *(plain(one) for one in value)]
    return value


def packed(file: FileId, start: int, batches: list[Batch]) -> bytes:
    data = b""
    for sequence, message in batches:
        data += rec.encode(file, start + len(data), sequence, message)
    return data


@given(FILE, st.integers(0, 2**40), SEQUENCES)
def test_what_is_packed_comes_back(file: FileId, start: int, batches: list[Batch]) -> None:
    data = packed(file, start, batches)
    found = rec.decode(file, start, memoryview(data + bytes(100)))
    assert plain(found.batches) == plain(batches)
    assert found.used == len(data)
    assert found.wanted == 0


@given(FILE, SEQUENCES, st.data())
def test_behind_a_damaged_byte_nothing_is_believed(
    file: FileId, batches: list[Batch], data: st.DataObject
) -> None:
    sound = packed(file, 0, batches)
    at = data.draw(st.integers(0, len(sound) - 1))
    damaged = bytearray(sound)
    damaged[at] ^= data.draw(st.integers(1, 255))
    found = rec.decode(file, 0, memoryview(damaged))
    count = len(found.batches)
    assert count < len(batches)
    assert plain(found.batches) == plain(batches[:count])
    assert found.used <= at


@given(FILE, SEQUENCES, st.data())
def test_a_torn_end_is_not_there_yet(
    file: FileId, batches: list[Batch], data: st.DataObject
) -> None:
    """Cut anywhere, with or without zeros behind: whole batches are read, and read on later."""
    whole = packed(file, 0, batches)
    cut = data.draw(st.integers(0, len(whole) - 1))
    found = rec.decode(file, 0, memoryview(whole[:cut]))
    assert plain(found.batches) == plain(batches[: len(found.batches)])
    assert found.used <= cut
    assert found.wanted > cut - found.used  # so that whoever has more reads more
    torn = whole[:cut] + bytes(len(whole) - cut)
    count = len(rec.decode(file, 0, memoryview(torn)).batches)
    if torn != whole:
        assert count < len(batches)
    rest = rec.decode(file, found.used, memoryview(whole[found.used :]))
    assert plain(found.batches + rest.batches) == plain(batches)


@given(FILE, SEQUENCES, st.integers(0, 2**20), FILE, st.integers(0, 2**20))
def test_bytes_of_another_place_are_not_believed(
    file: FileId, batches: list[Batch], start: int, other: FileId, elsewhere: int
) -> None:
    data = memoryview(packed(file, start, batches))
    if elsewhere != start:
        assert not rec.decode(file, elsewhere, data).batches
    if other != file:
        assert not rec.decode(other, start, data).batches


@given(st.binary(max_size=300), U32)
def test_garbage_is_no_batch_and_raises_nothing(tail: bytes, size: int) -> None:
    head = struct.pack("<IHHIQI", 0x4C43564B, 0, 0, size % 400, 1, 7)
    for data in (tail, head + tail):
        found = rec.decode(FileId(1, 1), 0, memoryview(data))
        assert found.batches == []
        assert found.used == 0


@given(FILE, st.integers(0, 11), st.binary(max_size=80))
def test_a_body_of_another_version_raises_nothing(file: FileId, kind: int, body: bytes) -> None:
    """Checksums may be right and the columns not what this version expects."""
    check = rec._checksum(file, 0, kind, 5, body)
    data = struct.pack("<IHHIQI", 0x4C43564B, kind, 0, len(body), 5, check) + body
    found = rec.decode(file, 0, memoryview(data))
    assert len(found.batches) <= 1


def test_a_full_batch_fits() -> None:
    keys = [number.to_bytes(rec.KEY_BYTES_MAX, "big") for number in range(rec.KEYS_MAX)]
    column = [2**32 - 1] * len(keys)
    put = rec.Put(FileId(1, 1), keys, [4096] * len(keys), column, column)
    for message in (put, rec.Entries(put, [2**128 - 1] * len(keys)), rec.Remove(keys)):
        data = rec.encode(FileId(2, 2), 0, 1, message)
        assert plain(rec.decode(FileId(2, 2), 0, memoryview(data)).batches) == plain(
            [Batch(1, message)]
        )


@given(KEY, FILE, st.integers(0, 2**20), st.binary(min_size=1, max_size=500), st.data())
def test_a_block_verifies_only_as_itself(
    key: bytes, segment: FileId, slot: int, block: bytes, data: st.DataObject
) -> None:
    """Any byte changed, cut off, or taken for another key, place or segment: another checksum."""
    offset = slot * rec.SLOT_BYTES
    sound = checksum_of(key, segment, offset, memoryview(block))
    damaged = bytearray(block)
    damaged[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(1, 255))
    assert checksum_of(key, segment, offset, memoryview(damaged)) != sound
    assert checksum_of(key, segment, offset, memoryview(block)[:-1]) != sound
    assert checksum_of(key, segment, offset + rec.SLOT_BYTES, memoryview(block)) != sound
    assert (
        checksum_of(key, segment._replace(number=1 ^ segment.number), offset, memoryview(block))
        != sound
    )
    assert checksum_of(bytes([key[0] ^ 1]) + key[1:], segment, offset, memoryview(block)) != sound
