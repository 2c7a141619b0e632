"""The buffers of a call as a stream sees them: descriptors, and memory with neighbours joined.

A batch of 4 KiB sinks that lie next to each other in a region becomes one piece of memory, and so
one entry of a scatter receive instead of hundreds.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from emberfs.fabric.frame import (
    STREAMED,
    Header,
    all_filled,
    malformed,
    pack_descriptors,
    unpack_filled,
)
from emberfs.fabric.region import Buffer, Region, Slice
from emberfs.fabric.sinks import PackedSinks
from emberfs.proto.errors import Code, EmberfsError


class Gathered(NamedTuple):
    """What a list of buffers comes to."""

    flat: list[int]  # region, offset, bytes of each; empty if they came packed
    sizes: list[int]  # empty if they came packed
    views: list[memoryview]  # streamed memory in order, neighbours joined
    length: int  # bytes of all
    streamed: int  # bytes of those that travel in the stream
    regions: list[Region]  # shared with the server
    buffers: Sequence[Buffer]
    packed: PackedSinks | None = None

    @property
    def number(self) -> int:
        """How many."""
        return len(self.sizes) if self.packed is None else self.packed.number

    @property
    def descriptors(self) -> bytes:
        """As the frame has them."""
        if self.packed is not None:
            return self.packed.descriptors
        return pack_descriptors(self.flat) if self.flat else b""

    def filled(self, header: Header, tail: bytes) -> Sequence[int]:
        """What a reply says that it has filled (see call.Reply). MALFORMED if that cannot be."""
        if self.packed is None:
            return unpack_filled(header, tail, self.sizes)
        if all_filled(header, tail):
            return ()
        return unpack_filled(header, tail, [part.length for part in self.packed.slices()])


_NOTHING = Gathered([], [], [], 0, 0, [], ())


def gather_sinks(
    sinks: Sequence[Buffer] | PackedSinks, share: Callable[[Region], bool] | None
) -> Gathered:
    """Describe sinks; those that are packed stay so if the server can reach all by itself."""
    if not isinstance(sinks, PackedSinks):
        return gather(sinks, share, writable=True)
    if share is not None and all(map(share, sinks.regions)):
        return Gathered([], [], [], sinks.length, 0, list(sinks.regions), (), sinks)
    if any(region.fd < 0 for region in sinks.regions):
        raise EmberfsError(Code.INVALID, "the region is closed")
    return gather(sinks.slices(), share)


def gather(
    buffers: Sequence[Buffer], share: Callable[[Region], bool] | None, *, writable: bool = False
) -> Gathered:
    """Describe buffers; `share` tells whether the server can reach a region by itself."""
    if not buffers:
        return _NOTHING
    flat: list[int] = []
    sizes: list[int] = []
    views: list[memoryview] = []
    regions: list[Region] = []
    shared: Region | None = None  # the last one that `share` agreed to
    run: Region | None = None  # the region of the piece being joined
    start = stop = length = streamed = 0
    for buffer in buffers:
        if type(buffer) is Slice:
            region, offset, size = buffer
            length += size
            sizes.append(size)
            if region is shared:
                flat += (region.id, offset, size)
                continue
            if share is not None and share(region):
                shared = region
                regions.append(region)
                flat += (region.id, offset, size)
                continue
            streamed += size
            flat += (STREAMED, 0, size)
            if region is run and offset == stop:
                stop += size
                continue
            if run is not None:
                views.append(run.view[start:stop])
            run, start, stop = region, offset, offset + size
            continue
        assert isinstance(buffer, memoryview)
        if run is not None:
            views.append(run.view[start:stop])
            run = None
        view = _bytes_view(buffer, writable)
        size = len(view)
        length += size
        streamed += size
        sizes.append(size)
        flat += (STREAMED, 0, size)
        views.append(view)
    if run is not None:
        views.append(run.view[start:stop])
    return Gathered(flat, sizes, views, length, streamed, regions, buffers)


def _bytes_view(view: memoryview, writable: bool) -> memoryview:
    if writable and view.readonly:
        raise EmberfsError(Code.INVALID, "a sink is read-only")
    if view.ndim == 1 and view.format == "B" and view.c_contiguous:
        return view
    if not view.c_contiguous:
        raise EmberfsError(Code.INVALID, "a buffer is not contiguous")
    return view.cast("B")


def filled_views(
    sinks: Gathered, filled: Sequence[int], payload_bytes: int
) -> Sequence[memoryview]:
    """Return where a reply's payload goes: the filled parts of the streamed sinks."""
    if filled is sinks.sizes or sinks.streamed == 0:
        expected, views = sinks.streamed, sinks.views
    else:
        views, expected = [], 0
        flat = sinks.flat
        for index, buffer in enumerate(sinks.buffers):
            count = filled[index]
            if count and flat[3 * index] == STREAMED:
                whole = buffer.view if isinstance(buffer, Slice) else _bytes_view(buffer, True)
                views.append(whole[:count])
                expected += count
    if expected != payload_bytes:
        raise malformed(f"REPLY carries {payload_bytes} bytes of payload for {expected}")
    return views
