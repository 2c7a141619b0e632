"""One call at its server: what came, where it goes, and what its handler says of it."""

import asyncio
from collections.abc import Sequence

from emberfs.fabric import frame
from emberfs.fabric.frame import STREAMED, Header
from emberfs.fabric.region import Slice
from emberfs.fabric.sinks import SinkTable
from emberfs.proto.errors import EmberfsError


class Call:
    """One call under way (see call.ServerCall)."""

    __slots__ = (
        "_filled",
        "_sinks",
        "body",
        "deadline_ns",
        "ended",
        "flat",
        "full",
        "header",
        "method",
        "peer",
        "request",
        "sink_bytes",
        "sink_table",
        "sinks_buffer",
        "source_bytes",
        "sources",
        "sources_buffer",
        "started",
        "streamed_sink_bytes",
        "task",
    )

    def __init__(
        self,
        header: Header,
        body: memoryview,
        peer: str,
        deadline_ns: int,
        flat: tuple[int, ...],
        sinks: SinkTable,
    ) -> None:
        self.header = header
        self.request = header.request
        self.method = header.method
        self.body = body
        self.peer = peer
        self.deadline_ns = deadline_ns
        self.flat = flat  # of the sources
        self.source_bytes = sum(flat[2::3])
        self.sink_table = sinks
        self.sink_bytes = 0
        self.streamed_sink_bytes = 0
        self.full = False
        self._filled: list[int] | None = None
        self._sinks: Sequence[memoryview] | None = None
        self.sources: Sequence[Slice] = ()
        self.sources_buffer: Slice | None = None
        self.sinks_buffer: Slice | None = None
        self.task: asyncio.Task[None] | None = None
        self.started = False
        self.ended: EmberfsError | None = None  # why it was told to stop

    @property
    def sinks(self) -> Sequence[memoryview]:
        """One by one."""
        if self._sinks is None:
            self._sinks = self.sink_table.views()
        return self._sinks

    def fill(self, sink: int, length: int) -> None:
        """Declare that the first `length` bytes of a sink are valid."""
        assert 0 <= length <= len(self.sinks[sink])
        if self._filled is None:
            self._filled = [0] * len(self.sinks)
        self._filled[sink] = length

    def fill_all(self) -> None:
        """Declare that every sink is full."""
        self.full = True

    def filled(self) -> Sequence[int] | None:
        """How much of each sink is valid; None: all of all."""
        if self.full:
            return None
        if self._filled is None:
            return [0] * self.sink_table.number if self.sink_bytes else None
        return None if self._filled == [len(sink) for sink in self.sinks] else self._filled


def filled_views(call: Call, filled: Sequence[int] | None) -> list[memoryview]:
    """Return the filled parts of streamed sinks, neighbours joined."""
    buffer = call.sinks_buffer
    if buffer is None:
        return []
    if filled is None:
        return [buffer.view]
    views = []
    whole = buffer.view
    start = at = stop = 0
    described = frame.iter_descriptors(call.sink_table.descriptors)
    for (region, _, size), count in zip(described, filled, strict=True):
        if region != STREAMED:
            continue
        if count:
            if at != stop:
                if stop > start:
                    views.append(whole[start:stop])
                start = at
            stop = at + count
        at += size
    if stop > start:
        views.append(whole[start:stop])
    return views
