"""Generators that follow the types: a new message or record is covered without editing a test.

`values_of(struct)` makes what an honest sender could make, with numbers at the edges of their
ranges. `hostile_of(struct)` makes any msgpack that has roughly the shape. `damaged(raw)` breaks
bytes that were valid.
"""

import dataclasses
import enum
import types
import typing
from typing import Any

import msgspec
from hypothesis import strategies as st

EDGES = (
    0,
    1,
    -1,
    2**7,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**56,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**31),
    -(2**63),
)
U16 = st.sampled_from((0, 1, 2, 255, 256, 2**15, 2**16 - 1)) | st.integers(0, 2**16 - 1)
U32 = st.sampled_from((0, 1, 2**31 - 1, 2**31, 2**32 - 1)) | st.integers(0, 2**32 - 1)
U63 = st.sampled_from((0, 1, 2**32, 2**63 - 1)) | st.integers(0, 2**63 - 1)
U64 = st.sampled_from((0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)) | st.integers(0, 2**64 - 1)
ANY_INT = st.sampled_from(EDGES) | st.integers(-(2**63), 2**64 - 1)
NAMES = st.sampled_from(
    (
        b"",
        b".",
        b"..",
        b"/",
        b"a",
        b"d",
        b"a/b",
        b"a\0b",
        b"\0",
        b"\xff\xfe",
        b"\xc3\x28",
        b"x" * 255,
        b"x" * 256,
        b"y" * 5000,
        b"user.a",
        b"../..",
        b"d/../d/./a//",
    )
) | st.binary(max_size=40)


def _bounded_ints(low: int, high: int) -> st.SearchStrategy[int]:
    edges = [edge for edge in EDGES if low <= edge <= high] + [low, high]
    return st.sampled_from(edges) | st.integers(low, high)


def _of_node(node: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    inspect = msgspec.inspect
    match node:
        case inspect.IntType():
            low = -(2**63) if node.ge is None else node.ge
            return _bounded_ints(low, 2**63 - 1 if node.le is None else node.le)
        case inspect.BoolType():
            return st.booleans()
        case inspect.FloatType():
            return st.floats(allow_nan=False)
        case inspect.StrType():
            return st.text(max_size=20)
        case inspect.BytesType():
            return NAMES
        case inspect.NoneType():
            return st.none()
        case inspect.EnumType():
            return st.sampled_from(list(node.cls))
        case inspect.VarTupleType():
            return st.lists(_of_node(node.item_type), max_size=4).map(tuple)
        case inspect.DictType():
            return st.dictionaries(_of_node(node.key_type), _of_node(node.value_type), max_size=3)
        case inspect.UnionType():
            return st.one_of([_of_node(one) for one in node.types])
        case inspect.StructType():
            return values_of(node.cls)
        case inspect.Metadata():
            return _of_node(node.type)
    raise NotImplementedError(f"teach strategies.py to make a {node}")


def values_of(struct: type[Any], **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Make valid instances of a struct type; `fixed` replaces the generator of some fields."""
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    parts = {
        field.name: fixed[field.name] if field.name in fixed else _of_node(field.type)
        for field in info.fields
    }
    return st.builds(struct, **parts)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    ANY_INT,
    st.floats(),
    NAMES,
    st.text(max_size=10),
    st.lists(ANY_INT, max_size=5),
    st.dictionaries(st.text(max_size=5), ANY_INT, max_size=2),
)


def _hostile_node(node: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    inspect = msgspec.inspect
    match node:
        case inspect.IntType() | inspect.EnumType():
            return ANY_INT
        case inspect.BytesType():
            return NAMES
        case inspect.VarTupleType():
            return st.lists(_hostile_node(node.item_type), max_size=4)
        case inspect.UnionType():
            return st.one_of([_hostile_node(one) for one in node.types])
        case inspect.StructType():
            return _hostile_struct(node)
        case inspect.Metadata():
            return _hostile_node(node.type)
    return _of_node(node)


def _hostile_struct(info: msgspec.inspect.StructType) -> st.SearchStrategy[Any]:
    fields = {field.encode_name: _hostile_node(field.type) for field in info.fields}
    if info.array_like:
        return st.tuples(*fields.values()).map(list)
    return st.fixed_dictionaries(fields)


def hostile_of(struct: type[Any]) -> st.SearchStrategy[bytes]:
    """Make msgpack of the shape of a struct, with numbers and bytes that nobody checked."""
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    shaped = _hostile_struct(info)
    if not info.array_like:
        names = [field.encode_name for field in info.fields]
        wrong = st.tuples(st.sampled_from(names or ["x"]), SCALARS)
        shaped = shaped | st.tuples(shaped, wrong).map(lambda both: both[0] | dict([both[1]]))
    return shaped.map(msgspec.msgpack.encode)


@st.composite
def damaged(draw: Any, raws: st.SearchStrategy[bytes]) -> bytes:
    """Break valid bytes: flip, cut, insert, repeat or overwrite, up to four times."""
    raw = bytearray(draw(raws))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        match draw(st.integers(0, 4)):
            case 0 if at < len(raw):
                raw[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del raw[at:]
            case 2:
                raw[at:at] = draw(st.binary(max_size=9))
            case 3:
                raw[at:at] = raw[draw(st.integers(0, len(raw))) :][:64]
            case 4:
                patch = draw(st.sampled_from((b"\xff" * 4, b"\xff" * 8, bytes(4), b"\xdd\xff")))
                raw[at : at + len(patch)] = patch
    return bytes(raw)


def structs_in(module: types.ModuleType) -> list[type[Any]]:
    """All message and record types that a module defines."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, msgspec.Struct)
        and value.__module__ == module.__name__
        and not (typing.get_args(value) or dataclasses.is_dataclass(value))
        and not isinstance(value, enum.EnumMeta)
    ]
