"""The content of one version of a chunk, verified: a block, overlays on it, checksums over both.

A view may grow stale while it is read (a flush writes an overlay in place, a block is reused); then
its checksums refute what was read and the reader tries again with a fresh view. A checksum mismatch
is damage only if nothing could have changed meanwhile.
"""

from collections.abc import Sequence
from enum import IntEnum

import msgspec

from emberfs.proto.ids import KiB, MiB
from emberfs.runtime.checksum import crc32c_blocks
from emberfs.storage.blocks import BlockFiles
from emberfs.storage.records import CHECKSUM_BYTES, grain_of
from emberfs.storage.redo import Overlay, patch

ZEROS = memoryview(bytes(1 * MiB))
_ZERO_CHECKSUMS = {size: crc32c_blocks(ZEROS[:size], size) for size in (4 * KiB, 64 * KiB)}


class View(msgspec.Struct, frozen=True, gc=False):
    """What is needed to read one version."""

    version: int
    block: int
    length: int
    checksums: bytes
    overlays: tuple[Overlay, ...]  # laid over the block in this order


class Outcome(IntEnum):
    """How a read of a view ended."""

    DONE = 0
    REFUTED = 1  # not what the checksums say
    BLOCKED = 2  # not in memory, and the reader must not wait


def read_view(
    files: BlockFiles, view: View, offset: int, sink: memoryview, *, cached: bool
) -> Outcome:
    """Fill `sink` with the verified content from `offset`; all of it lies in the chunk.

    Whole grains are read straight into the sink; only partial ones at the edges go through a small
    buffer, because a checksum covers a whole grain. Raises DISK.
    """
    grain = grain_of(view.length)
    stop = offset + len(sink)
    assert stop <= view.length
    low = offset - offset % grain
    high = min(-(-stop // grain) * grain, view.length)
    if low == offset and high == stop:
        return _fill(files, view, low, sink, grain, cached)
    if high - low <= 2 * grain:
        bounce = memoryview(bytearray(high - low))
        outcome = _fill(files, view, low, bounce, grain, cached)
        sink[:] = bounce[offset - low : stop - low]
        return outcome
    first = low + grain if low < offset else low
    last = stop - stop % grain if high > stop else stop
    for start, end in ((offset, first), (first, last), (last, stop)):
        if start < end:
            part = sink[start - offset : end - offset]
            outcome = read_view(files, view, start, part, cached=cached)
            if outcome != Outcome.DONE:
                return outcome
    return Outcome.DONE


def _fill(
    files: BlockFiles, view: View, start: int, target: memoryview, grain: int, cached: bool
) -> Outcome:
    """Read whole grains and verify them in one pass."""
    read = files.read_cached_into if cached else files.read_into
    count = read(view.block, start, target) if len(target) else 0
    if count < 0:
        return Outcome.BLOCKED
    if count < len(target):  # the file lost its end in a power cut; overlays may still cover it
        target[count:] = bytes(len(target) - count)
    for overlay in view.overlays:
        if overlay:
            patch(target, start, overlay)
    first = start // grain * CHECKSUM_BYTES
    found = crc32c_blocks(target, grain)
    expected = view.checksums[first : first + len(found)]
    return Outcome.DONE if found == expected else Outcome.REFUTED


def read_unverified(files: BlockFiles, view: View, sink: memoryview) -> None:
    """Fill `sink` with a whole version as it lies on the disk, damage and all. Raises DISK."""
    assert len(sink) == view.length
    count = files.read_into(view.block, 0, sink) if view.length else 0
    if count < len(sink):
        sink[count:] = bytes(len(sink) - count)
    for overlay in view.overlays:
        if overlay:
            patch(sink, 0, overlay)


def zeros(length: int) -> list[memoryview]:
    """Return views that together are `length` zero bytes."""
    whole, rest = divmod(length, len(ZEROS))
    return [ZEROS] * whole + ([ZEROS[:rest]] if rest else [])


def stream_checksums(prefix: memoryview, gap: int, data: memoryview, grain: int) -> bytes:
    """Return the checksums of prefix + `gap` zeros + data, which begin at a grain's start.

    The prefix is shorter than a grain. Data is checksummed in place, zeros are not computed.
    """
    assert len(prefix) < grain
    lead = len(prefix) + gap
    if not lead:
        return crc32c_blocks(data, grain)
    total = lead + len(data)
    parts: list[bytes] = []
    at = 0
    if len(prefix):
        head = bytearray(min(grain, total))
        head[: len(prefix)] = prefix
        head[lead:] = data[: max(0, len(head) - lead)]
        parts.append(crc32c_blocks(memoryview(head), grain))
        at = len(head)
    if at < lead:
        count = (lead - at) // grain
        parts.append(_ZERO_CHECKSUMS[grain] * count)
        at += count * grain
    if at < lead:
        mixed = bytearray(min(grain, total - at))
        mixed[lead - at :] = data[: len(mixed) - (lead - at)]
        parts.append(crc32c_blocks(memoryview(mixed), grain))
        at += len(mixed)
    if at < total:
        parts.append(crc32c_blocks(data[at - lead :], grain))
    return b"".join(parts)


def length_of(views: Sequence[memoryview]) -> int:
    """Sum of the lengths."""
    return sum(map(len, views))
