"""Key encodings keep order, round-trip, and never overlap."""

from hypothesis import given
from hypothesis import strategies as st

from emberfs.kv import keys

IDS = st.integers(min_value=0, max_value=(1 << 63) - 1)
NAMES = st.binary(min_size=1, max_size=255)


def test_prefixes_are_unique_single_bytes() -> None:
    values = [bytes(prefix.value) for prefix in keys.Prefix.__members__.values()]  # aliases, too
    assert len(set(values)) == len(values)
    assert all(len(value) == 1 and value < b"\x80" for value in values)


@given(IDS, IDS, NAMES, NAMES)
def test_entries_sort_by_parent_then_name(a: int, b: int, x: bytes, y: bytes) -> None:
    assert (keys.entry_key(a, x) < keys.entry_key(b, y)) == ((a, x) < (b, y))
    assert keys.entry_name(keys.entry_key(a, x)) == x


@given(IDS, IDS, NAMES, NAMES)
def test_entry_span_holds_exactly_the_names_behind(a: int, b: int, x: bytes, y: bytes) -> None:
    span = keys.entry_span(a, x)
    inside = span.start <= keys.entry_key(b, y) < span.stop
    assert inside == (a == b and y > x)


@given(IDS, IDS)
def test_round_trips(a: int, b: int) -> None:
    assert keys.unpack_session_key(keys.session_key(a, b)) == (a, b)
    assert keys.unpack_inode_suffix(keys.deleted_key(b, a)) == a
    assert keys.unpack_inode_suffix(keys.trim_key(a)) == a
    age = keys.ReplyAge(a, b, 3, 7)
    assert keys.unpack_reply_age_key(keys.reply_age_key(age)) == age
    assert keys.xattr_name(keys.xattr_key(a, b"user.x")) == b"user.x"


@given(IDS, IDS)
def test_spans_of_one_inode(a: int, b: int) -> None:
    span = keys.session_span(a)
    assert (span.start <= keys.session_key(b, 5) < span.stop) == (a == b)
    attributes = keys.xattr_span(a)
    assert (attributes.start <= keys.xattr_key(b, b"n") < attributes.stop) == (a == b)
    ages = keys.reply_age_span(5, a)
    assert (ages.start <= keys.reply_age_key(keys.ReplyAge(5, b, 1, 1)) < ages.stop) == (b < a)
    assert not ages.start <= keys.reply_age_key(keys.ReplyAge(6, b, 1, 1)) < ages.stop
    own = keys.reply_ages_of(a)
    assert (own.start <= keys.reply_age_key(keys.ReplyAge(b, 1, 1, 1)) < own.stop) == (a == b)


def test_ages_of_before_servers_were_told_apart() -> None:
    """They are found as those of servers that are gone, each by itself."""
    key = b"r" + (9).to_bytes(8) + (5).to_bytes(8) + (7).to_bytes(8)
    age = keys.unpack_reply_age_key(key)
    assert (age.client, age.sequence) == (5, 7)
    span = keys.reply_ages_of(age.server)
    assert span.start <= key < span.stop


def test_span_of_a_prefix() -> None:
    assert keys.span_of(b"M") == (b"M", b"N")
    assert keys.span_of(b"M\xff") == (b"M\xff", b"N")
