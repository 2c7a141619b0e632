"""What a server of keys must offer so that remote.RemoteEngine can make an engine of it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from emberfs.kv.history import ReadSet, WriteSet
from emberfs.kv.store import Row
from emberfs.proto.errors import Code, EmberfsError


class AwayError(EmberfsError):
    """The server does not answer, and nothing has happened. Worth another try."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.UNREACHABLE, message)


class Limits(NamedTuple):
    """What one transaction may hold. `commit` refuses more with TRANSACTION_TOO_LARGE."""

    key_bytes: int
    value_bytes: int
    transaction_bytes: int
    rows: int  # written, or depended on


class Attempt(Protocol):
    """One transaction at the server; all that it reads is of one moment.

    Reads raise AwayError, CONFLICT or TOO_OLD.
    """

    @property
    def version(self) -> int:
        """Of that moment, where the engine has such a number; 0 before the first read."""
        ...

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values in the order of the keys."""
        ...

    async def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool) -> list[Row]:
        """Return the rows of [start, stop); at most `limit` if that is not 0."""
        ...

    async def finish(self) -> None:
        """End a transaction that writes nothing. CONFLICT if what it read was of no moment."""
        ...

    async def commit(self, read: ReadSet, written: WriteSet) -> int:
        """Validate and write: clears, then writes and stamps. There are no adds and no ranges.

        Returns a version. CONFLICT, TOO_OLD, AwayError: nothing happened. MAYBE_COMMITTED.
        """
        ...

    def cancel(self) -> None:
        """Release it, without waiting. May be repeated."""
        ...


class Backend(Protocol):
    """The server."""

    limits: Limits

    def attempt(self, *, read_only: bool) -> Attempt:
        """Begin a transaction; nothing is sent before the first read."""
        ...

    async def open(self) -> None:
        """Check that the server is there and fit. EmberfsError(CONFIG) says what to change."""
        ...

    async def await_write(self, key: bytes, version: int) -> None:
        """Return when a key may have been written after `version`; sooner does no harm."""
        ...

    async def close(self) -> None:
        """Release everything."""
        ...
