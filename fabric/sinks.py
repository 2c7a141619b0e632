"""The sinks of a call in bulk: hundreds of small ones that no Python loop should look at.

Both ends keep the packed descriptors of the frame (frame.py): a caller that has made them so, and a
handler whose compiled code reads them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from emberfs.fabric._sinks import survey as _native
from emberfs.fabric.frame import DESCRIPTOR_BYTES, STREAMED, iter_descriptors, pack_descriptors
from emberfs.fabric.region import Region, Slice

_NOTHING = memoryview(bytearray())

# Bytes of all sinks and of those that are streamed; the first that is not inside its region or
# whose region is unknown, -1 if there is none; the regions that occur.
Survey: TypeAlias = tuple[int, int, int, dict[int, memoryview]]


class PackedSinks(NamedTuple):
    """Sinks of one call as its caller has described them: all are parts of regions."""

    descriptors: bytes
    length: int  # bytes of all
    regions: Sequence[Region]

    @property
    def number(self) -> int:
        """How many."""
        return len(self.descriptors) // DESCRIPTOR_BYTES

    def slices(self) -> list[Slice]:
        """One by one, for a connection that shares no memory."""
        regions = {region.id: region for region in self.regions}
        return [
            Slice(regions[region], offset, length)
            for region, offset, length in iter_descriptors(self.descriptors)
        ]


class SinkTable(NamedTuple):
    """Sinks of one call as its handler sees them. Each is inside its region."""

    descriptors: bytes
    regions: Mapping[int, memoryview]
    streamed: memoryview = _NOTHING  # those of region 0 follow each other there

    @property
    def number(self) -> int:
        """How many."""
        return len(self.descriptors) // DESCRIPTOR_BYTES

    @classmethod
    def of(cls, views: Sequence[memoryview]) -> "SinkTable":
        """Make one of memory at hand, each a region of its own."""
        flat = [number for i, view in enumerate(views, 1) for number in (i, 0, len(view))]
        return cls(pack_descriptors(flat) if flat else b"", dict(enumerate(views, 1)))

    def views(self) -> list[memoryview]:
        """One by one."""
        found, at = [], 0
        for region, offset, length in iter_descriptors(self.descriptors):
            if region == STREAMED:
                found.append(self.streamed[at : at + length])
                at += length
            else:
                found.append(self.regions[region][offset : offset + length])
        return found


def survey(descriptors: bytes, regions: Mapping[int, memoryview]) -> Survey:
    """Check descriptors and add them up."""
    return _native(descriptors, regions)


def survey_twin(descriptors: bytes, regions: Mapping[int, memoryview]) -> Survey:
    """Do the same in Python: the oracle of its test."""
    total = streamed = 0
    bad, used = -1, {}
    for place, (region, offset, length) in enumerate(iter_descriptors(descriptors)):
        total += length
        if region == STREAMED:
            streamed += length
            continue
        view = regions.get(region)
        if view is not None:
            used[region] = view
        if bad < 0 and (view is None or offset + length > len(view)):
            bad = place
    return total, streamed, bad, used
