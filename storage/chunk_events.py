"""What happens to a chunk at one replica, and what is to be done about it [pure].

The events and effects of craq.ChunkMachine, and what it must know of a stored chunk.
"""

from typing import Protocol

import msgspec

from emberfs.proto.errors import Code
from emberfs.proto.ids import TargetId
from emberfs.proto.storage_calls import RememberedWrite, UpdateKind, UpdateRequest
from emberfs.storage.view import View


class Pending(Protocol):
    """The version of a chunk that is prepared and not committed."""

    @property
    def version(self) -> int:
        """See the class."""
        ...

    @property
    def kind(self) -> UpdateKind:
        """See the class."""
        ...

    @property
    def length(self) -> int:
        """See the class."""
        ...

    @property
    def remembered(self) -> tuple[RememberedWrite, ...]:
        """See the class."""
        ...

    @property
    def removes(self) -> bool:
        """Committing it makes the chunk absent."""
        ...


class State(Protocol):
    """What the store knows of a chunk; version 0 with a pending one is a chunk being created."""

    @property
    def version(self) -> int:
        """See the class."""
        ...

    @property
    def length(self) -> int:
        """See the class."""
        ...

    @property
    def remembered(self) -> tuple[RememberedWrite, ...]:
        """See the class."""
        ...

    @property
    def pending(self) -> Pending | None:
        """See the class."""
        ...


# ---------------------------------------------------------------- events


class UpdateArrived(msgspec.Struct, frozen=True, gc=False):
    """A verified request; `key` names who waits for the answer (and who holds the payload)."""

    key: int
    request: UpdateRequest


class HoldArrived(msgspec.Struct, frozen=True, gc=False):
    """Somebody wants the chunk to stand still; answered by Granted, ended by Abandoned."""

    key: int


class ResumeArrived(msgspec.Struct, frozen=True, gc=False):
    """A leftover pending version may exist and should be finished; answered when none is left."""

    key: int


class Abandoned(msgspec.Struct, frozen=True, gc=False):
    """Whoever is behind `key` has gone, or lets go of its hold."""

    key: int


class RoutingChanged(msgspec.Struct, frozen=True, gc=False):
    """The chain looks different now."""

    view: View


class Prepared(msgspec.Struct, frozen=True):
    """The store holds the pending version; survives kill -9."""

    state: State


class Committed(msgspec.Struct, frozen=True):
    """The store has committed; None when the chunk is absent now."""

    state: State | None
    tombstone: tuple[RememberedWrite, ...] = ()  # of an absent chunk: who wrote it


class Discarded(msgspec.Struct, frozen=True):
    """The pending version is gone."""

    state: State | None


class StoreFailed(msgspec.Struct, frozen=True):
    """Prepare, commit or discard failed and changed nothing."""

    state: State | None
    code: Code
    message: str


class ForwardAnswered(msgspec.Struct, frozen=True, gc=False):
    """The successor has committed attempt number `attempt`."""

    attempt: int


class ForwardFailed(msgspec.Struct, frozen=True, gc=False):
    """Attempt number `attempt` failed."""

    attempt: int
    code: Code
    message: str


class RetryDue(msgspec.Struct, frozen=True, gc=False):
    """The pause after attempt number `attempt` is over."""

    attempt: int


class Repaired(msgspec.Struct, frozen=True):
    """A damaged chunk was (or could not be) replaced from another replica."""

    state: State | None
    healed: bool
    message: str


Event = (
    UpdateArrived
    | HoldArrived
    | ResumeArrived
    | Abandoned
    | RoutingChanged
    | Prepared
    | Committed
    | Discarded
    | StoreFailed
    | ForwardAnswered
    | ForwardFailed
    | RetryDue
    | Repaired
)


# ---------------------------------------------------------------- effects


class Prepare(msgspec.Struct, frozen=True, gc=False):
    """Write the payload of `key` as pending `version`; with `commit` in the same batch.

    It takes the place of a pending version in one step.
    """

    key: int
    request: UpdateRequest
    version: int
    remembered: tuple[RememberedWrite, ...]
    commit: bool


class Commit(msgspec.Struct, frozen=True, gc=False):
    """Make the pending version the committed one."""

    version: int


class Discard(msgspec.Struct, frozen=True, gc=False):
    """Drop the pending version; come back with Discarded."""


class Forward(msgspec.Struct, frozen=True, gc=False):
    """Send the update on. `whole`: as REPLACE, with our own view of pending `version`."""

    key: int
    request: UpdateRequest | None  # None for a leftover, which is always sent whole
    attempt: int
    successor: TargetId
    chain_version: int
    version: int
    whole: bool


class CancelForward(msgspec.Struct, frozen=True, gc=False):
    """Nobody waits for this attempt any more."""

    attempt: int


class Pause(msgspec.Struct, frozen=True, gc=False):
    """Come back with RetryDue."""

    attempt: int
    duration_ns: int


class Repair(msgspec.Struct, frozen=True, gc=False):
    """Replace the damaged committed version from another serving replica."""


class Granted(msgspec.Struct, frozen=True, gc=False):
    """The chunk stands still for the holder of `key`."""

    key: int


class Reply(msgspec.Struct, frozen=True, gc=False):
    """Answer `key`: success with version and length when `code` is None."""

    key: int
    code: Code | None
    message: str
    version: int
    length: int


Effect = Prepare | Commit | Discard | Forward | CancelForward | Pause | Repair | Granted | Reply
