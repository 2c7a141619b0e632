"""The two ends of a fabric call, as every transport offers them.

The caller names memory: `sources` the server pulls, `sinks` the server fills. The server drives the
transfer, as with RDMA READ and WRITE. Which transport carries it is invisible here.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

from emberfs.fabric.region import Buffer, Slice
from emberfs.fabric.sinks import PackedSinks, SinkTable
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import MiB

BODY_BYTES_MAX = 4 * MiB
PAYLOAD_BYTES_MAX = 64 * MiB  # all sources, or all sinks, of one call
SINKS_MAX = 1024
SOURCES_MAX = 64


class Reply(NamedTuple):
    """What came back."""

    body: bytes
    # Bytes written into each sink, from its start. Of PackedSinks that are all full: empty.
    filled: Sequence[int]


class Started(NamedTuple):
    """A call under way."""

    # Done when nothing touches the call's memory any more. It must not be cancelled: that would not
    # stop the server.
    future: asyncio.Future[Reply]
    give_up: Callable[[EmberfsError], None]  # cancel at the server; the future fails with this


class Peer(Protocol):
    """A connection to one server."""

    endpoint: str
    transport: str  # "tcp", "shm"

    async def call(
        self,
        method: int,
        body: bytes,
        *,
        sources: Sequence[Buffer] = (),
        sinks: Sequence[Buffer] | PackedSinks = (),
        timeout_ns: int,
    ) -> Reply:
        """Perform one call.

        When this returns or raises, no byte of `sinks` changes any more and `sources` are no longer
        read. Raises EmberfsError: the server's own code, or TIMEOUT, DISCONNECTED, TOO_LARGE,
        OVERLOADED, MALFORMED. Cancelling the task cancels the call at the server.
        """
        ...

    def start(
        self,
        method: int,
        body: bytes,
        *,
        sinks: Sequence[Buffer] | PackedSinks = (),
        timeout_ns: int,
    ) -> Started | None:
        """Begin a call without a coroutine; None if it would have to wait first: use `call`.

        The future says what `call` would; what is wrong from the start is raised here.
        """
        ...

    @property
    def closed(self) -> bool:
        """True once the connection is gone; every pending call has then failed."""
        ...

    async def close(self) -> None:
        """End the connection; pending calls fail with DISCONNECTED."""
        ...


class ServerCall(Protocol):
    """One call as its handler sees it."""

    method: int
    body: memoryview  # valid until the handler returns
    peer: str  # who calls, for logs
    deadline_ns: int  # on the server's monotonic clock
    # Private copies in server-owned shared memory, so that forwarding them is zero-copy again;
    # valid until the handler returns. Their contents cannot change under the handler.
    sources: Sequence[Slice]

    # Where read data goes: the caller's own memory (shm) or a pooled buffer (tcp). Writable.
    @property
    def sinks(self) -> Sequence[memoryview]:
        """One by one."""
        ...

    sink_table: SinkTable  # all of them, for compiled code
    sink_bytes: int

    def fill(self, sink: int, length: int) -> None:
        """Declare that the first `length` bytes of a sink are valid (0 if never called)."""
        ...

    def fill_all(self) -> None:
        """Declare that every sink is full."""
        ...


# A handler returns the reply's body, or raises EmberfsError. It is cancelled when the caller
# cancels, its deadline passes or its connection goes; what must finish is shielded by the handler.
Handler = Callable[[ServerCall], Awaitable[bytes]]

# Answers without waiting for anything, or returns None: then the method's Handler does it. What is
# answered within microseconds does not need a task.
QuickHandler = Callable[[ServerCall], bytes | None]
