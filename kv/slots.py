"""Rows that belong to one running transaction at a time: what became of a commit, and shares.

A transaction takes a slot when it begins and writes a token into the slot's row, beside its own
writes and with a read conflict on it. When the answer of a commit is lost, the row tells: the token
is there, so it was committed; or it is not, and whoever writes another token makes sure that it
never will be. Hence an outcome is known as soon as the server answers again, on every engine.

An add to a counter (keys.Prefix.COUNTER) goes to the slot's share of it, a row of its own: adds
from many transactions meet in no row. The counter's value is its own row and all shares together.
"""

import struct

from emberfs.kv.keys import Prefix, Span, span_of
from emberfs.proto.ids import SECOND
from emberfs.runtime.env import Env

_ROW = struct.Struct(">16sQ")  # token, time of day in seconds
_NUMBER = struct.Struct(">I")
_ENGINE = bytes(Prefix.ENGINE.value)
_SLOT = _ENGINE + b"s"
_SHARE = _ENGINE + b"a"
_COUNTER_PREFIX = bytes(Prefix.COUNTER.value)

ID_BYTES = 12
TOKEN_BYTES = 16
COUNTERS = span_of(_COUNTER_PREFIX)
SHARES = span_of(_SHARE)
SLOTS = span_of(_SLOT)
ENGINE_ROWS = span_of(_ENGINE)


def is_counter(key: bytes) -> bool:
    """Tell whether adds to this key go to shares."""
    return key[:1] == _COUNTER_PREFIX


def share_span(counter: bytes) -> Span:
    """All shares of a counter."""
    return Span(_SHARE + counter + b"\0", _SHARE + counter + b"\1")


def counter_of(share: bytes) -> bytes:
    """Return the counter that a share belongs to."""
    return share[len(_SHARE) : -ID_BYTES - 1]


def slot_of_share(share: bytes) -> bytes:
    """Return the key of the slot that a share belongs to."""
    return _SLOT + share[-ID_BYTES:]


def slot_time_s(row: bytes) -> int:
    """Return when a slot was last used, by the time of day of its process."""
    seconds: int = _ROW.unpack(row)[1]
    return seconds


class Slot:
    """One of them."""

    __slots__ = ("_id", "key")

    def __init__(self, identity: bytes) -> None:
        self._id = identity
        self.key = _SLOT + identity

    def share(self, counter: bytes) -> bytes:
        """Key of the slot's share of a counter."""
        return _SHARE + counter + b"\0" + self._id


class Doubt:
    """A commit whose outcome is not known yet."""

    def __init__(self, slot: Slot, token: bytes) -> None:
        self.slot = slot
        self.token = token
        self.committed: bool | None = None


class Slots:
    """The slots of one engine: as many as it ever had transactions at a time."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._process = env.random.getrandbits(64).to_bytes(8, "big")
        self._made = 0
        self._free: list[Slot] = []
        self.doubts: list[Doubt] = []

    def take(self) -> Slot:
        """Return a slot that no other transaction has."""
        if self._free:
            return self._free.pop()
        self._made += 1
        return Slot(self._process + _NUMBER.pack(self._made))

    def give(self, slot: Slot) -> None:
        """Return a slot that is in no doubt."""
        self._free.append(slot)

    def new_token(self) -> bytes:
        """Return one that nobody ever had."""
        return self._env.random.getrandbits(8 * TOKEN_BYTES).to_bytes(TOKEN_BYTES, "big")

    def row(self, token: bytes) -> bytes:
        """Return a slot's row."""
        return _ROW.pack(token, self._env.wall_ns() // SECOND)


def token_in(row: bytes | None) -> bytes:
    """Return the token in a slot's row, empty if there is none."""
    return row[:TOKEN_BYTES] if row else b""
