"""What a service may expect of a transactional engine, wherever it runs.

transaction.Engine is the one in this process; remote.RemoteEngine stands before a server, and
finds out what became of a commit whose answer was lost. Only when it cannot within its patience
does `run` fail with MAYBE_COMMITTED: the work may have taken effect. It does not take effect any
later than the next transaction of this engine begins. Who then repeats the work must write it so
that a second run does no harm: let it read what it depends on.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from emberfs.kv.store import Row
from emberfs.kv.transaction import Transaction

T = TypeVar("T")


class ReadWrite(Protocol):
    """The part of a transaction that a service needs which knows of no engine."""

    async def get(self, key: bytes, snapshot: bool = False) -> bytes | None:
        """Return the value. With `snapshot` a later change of it does not fail the commit."""
        ...

    async def get_many(self, keys: Sequence[bytes], snapshot: bool = False) -> list[bytes | None]:
        """Return the values in the order of the keys."""
        ...

    async def get_range(
        self,
        start: bytes,
        stop: bytes,
        limit: int = 0,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> list[Row]:
        """Return the rows of [start, stop)."""
        ...

    def set(self, key: bytes, value: bytes) -> None:
        """Write a value at commit."""
        ...

    def clear(self, key: bytes) -> None:
        """Delete a key at commit."""
        ...


class Transactions(Protocol):
    """An engine."""

    async def run(
        self,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        read_only: bool = False,
        durable: bool = False,
    ) -> T:
        """Run `work` in a transaction and commit it, again from the start when it conflicts.

        With `durable` the answer comes when it, and everything before it, is on stable storage.
        Raises what `work` raises, else EmberfsError.
        """
        ...

    async def sync(self) -> None:
        """Wait until everything committed so far is stable."""
        ...

    async def close(self) -> None:
        """Release the engine."""
        ...


class Engine(Transactions, Protocol):
    """All that an engine can do."""

    @property
    def conflicts(self) -> int:
        """How many commits were refused so far."""
        ...

    def begin(self, *, read_only: bool = False) -> Transaction:
        """Start a transaction by hand; `run` is what one usually wants."""
        ...

    async def watch(self, key: bytes, seen: bytes | None) -> bytes | None:
        """Return the value of a key as soon as it is another one than `seen`."""
        ...
