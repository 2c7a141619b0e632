"""What a service may expect of a transactional engine, wherever it runs.

transaction.Engine is the one in this process. Another may stand behind a network: its `run` can
fail with MAYBE_COMMITTED or TIMEOUT and yet take effect, even later. `work` must therefore be
written so that a second run, or a late first one, does no harm: let it read what it depends on.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from emberfs.kv.store import Row

T = TypeVar("T")


class ReadWrite(Protocol):
    """A transaction as its work sees it; see transaction.Transaction."""

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
        work: Callable[[ReadWrite], Awaitable[T]],
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
