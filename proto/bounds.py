"""Numbers as they may arrive: integers with the range of what they become.

msgspec takes any integer of 64 bits for an `int`; what leaves the range of a key, a mode or a time
is refused by the decoder (MALFORMED) before a handler sees it.
"""

from typing import Annotated

from msgspec import Meta, MsgspecError

from emberfs.proto.ids import InodeId, SessionId, TargetId

# What msgspec raises for bytes that are not what was expected: its own error, text that is not
# UTF-8, and nesting (of a field that nobody knows) deeper than the stack.
UNDECODABLE = (MsgspecError, UnicodeDecodeError, RecursionError)

_U32 = Meta(ge=0, le=(1 << 32) - 1)
_U63 = Meta(ge=0, le=(1 << 63) - 1)

U32 = Annotated[int, _U32]  # uids, modes, flags
U63 = Annotated[int, _U63]
U64 = Annotated[int, Meta(ge=0)]  # msgpack has no larger one
I64 = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]  # lengths, times in ns
BoundedInode = Annotated[InodeId, _U63]
BoundedTarget = Annotated[TargetId, _U32]
BoundedSession = Annotated[SessionId, _U63]

GROUPS_MAX = 65_536  # NGROUPS_MAX of Linux
Groups = Annotated[tuple[U32, ...], Meta(max_length=GROUPS_MAX)]
