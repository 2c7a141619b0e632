"""Stored bytes: what was written comes back, what was damaged is one clear error or a sound value.

The rows are covered by the checksums of the row store (RocksDB verifies its blocks); chunk data by
those in the records. So a decoder need not find every flipped bit, but it may raise nothing else.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import emberfs.proto
from emberfs.kv import keys
from emberfs.kv.memory import MemoryStore
from emberfs.meta import schema
from emberfs.proto import ids
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.storage import records
from emberfs.storage.records import ChunkRecord, PendingRecord, RedoRecord, TombstoneRecord
from fuzz.profile import budget
from fuzz.strategies import U32, U63, U64, damaged, hostile_of, structs_in, values_of

PROTO_MODULES = [
    importlib.import_module(f"emberfs.proto.{found.name}")
    for found in pkgutil.iter_modules(emberfs.proto.__path__)
    if "_pb2" not in found.name
]
WIRE_TYPES = [
    struct for module in [*PROTO_MODULES, schema, records] for struct in structs_in(module)
]


@pytest.mark.parametrize("struct", WIRE_TYPES, ids=lambda struct: str(struct.__name__))
def test_r14_every_wire_and_stored_type_comes_back(struct: type[Any]) -> None:
    """Every message and record survives msgpack with all its numbers at the edges."""
    decode = msgspec.msgpack.Decoder(struct).decode

    @budget(40)
    @given(values_of(struct))
    def tried(value: Any) -> None:
        assert decode(msgspec.msgpack.encode(value)) == value

    tried()


def test_r14_every_order_preserving_key_comes_back() -> None:
    """Keys keep numeric order and give back their parts at the edges of the ranges."""

    @budget(200)
    @given(U63, U63, U64, U32, U32)
    def tried(a: int, b: int, c: int, i: int, j: int) -> None:
        assert keys.unpack_session_key(keys.session_key(a, b)) == (a, b)
        age, other_age = keys.ReplyAge(a, c, b, i), keys.ReplyAge(b, a, c, j)
        assert keys.unpack_reply_age_key(keys.reply_age_key(age)) == age
        assert keys.unpack_inode_suffix(keys.deleted_key(c, a)) == a
        assert keys.unpack_inode_suffix(keys.inline_key(a)) == a
        assert keys.unpack_inode_suffix(keys.owner_key(a)) == a
        assert keys.unpack_owner(keys.pack_owner(a)) == a
        assert (keys.session_key(a, c) < keys.session_key(b, c)) == (a < b)
        assert (keys.reply_age_key(age) < keys.reply_age_key(other_age)) == (age < other_age)
        one, other = ids.pack_chunk_id(ids.InodeId(a), i), ids.pack_chunk_id(ids.InodeId(b), j)
        assert ids.unpack_chunk_id(one) == (a, i)
        assert (one < other) == ((a, i) < (b, j))
        chunk, epoch = records.parse_undo_key(records.undo_key(one, c))
        assert (chunk, epoch) == (one, c)
        assert records.parse_redo_key(records.redo_key(one, b, c)) == (one, b, c)

    tried()


KEY = b"M" + bytes(12)
TOMBSTONE = records.encode(TombstoneRecord(1, ()))
_CHUNK = values_of(ChunkRecord).map(records.encode)
_PENDING = values_of(PendingRecord).map(records.encode)
_TOMBSTONE = values_of(TombstoneRecord).map(records.encode)
_REDO = st.builds(RedoRecord, U32, U32, st.binary(max_size=50)).map(records.encode_redo)

DECODERS: dict[str, tuple[Callable[[bytes], Any], st.SearchStrategy[bytes], Code]] = {
    "chunk": (lambda raw: records.decode_record(KEY, raw), _CHUNK, Code.DISK),
    "pending": (lambda raw: records.decode_pending(KEY, raw), _PENDING, Code.DISK),
    "tombstone": (lambda raw: records.decode_tombstone(KEY, raw), _TOMBSTONE, Code.DISK),
    "tombstone key": (
        lambda raw: records.decode_tombstone(raw, TOMBSTONE),
        st.binary(max_size=40),
        Code.DISK,
    ),
    "redo": (lambda raw: records.decode_redo(KEY, raw), _REDO, Code.DISK),
    "bitmap": (lambda raw: records.parse_group_row(raw, raw), st.binary(max_size=20), Code.DISK),
    "redo key": (records.parse_redo_key, st.binary(max_size=40), Code.DISK),
    "undo key": (records.parse_undo_key, st.binary(max_size=40), Code.DISK),
    **{
        name.lower(): (codec.decode, values_of(codec.record).map(codec.encode), Code.INTERNAL)
        for name, codec in vars(schema).items()
        if isinstance(codec, schema.Codec)
    },
}


@pytest.mark.parametrize("name", DECODERS)
def test_damaged_records_are_one_clear_error(name: str) -> None:
    """A damaged record is refused with the code of damage; no other exception escapes."""
    decode, valid, code = DECODERS[name]

    @budget(150)
    @given(damaged(valid) | st.binary(max_size=40))
    def tried(raw: bytes) -> None:
        found = code
        try:
            decode(raw)
        except EmberfsError as problem:
            found = problem.code
        assert found is code

    tried()


@budget(100)
@given(hostile_of(Inode))
def test_a_stored_inode_of_wild_numbers_is_an_inode_or_an_error(raw: bytes) -> None:
    try:
        inode = schema.INODE.decode(raw)
    except EmberfsError:
        return
    assert schema.INODE.decode(schema.INODE.encode(inode)) == inode


def test_a_scan_over_noise_ends() -> None:
    """Rows with keys of any bytes are found in order by every span."""

    @budget(50)
    @given(st.lists(st.binary(min_size=1, max_size=20), unique=True, max_size=10))
    def tried(rows: list[bytes]) -> None:
        store = MemoryStore()
        store.write([(row, b"") for row in rows])
        for prefix in keys.Prefix:
            start, stop = keys.span_of(bytes(prefix.value))
            expected = sorted(row for row in rows if row.startswith(bytes(prefix.value)))
            assert [key for key, _ in store.scan(start, stop)] == expected

    tried()
