"""Redo data of a block: small updates that are logged and not yet written in place.

The overlay is the fold of the block's R rows in version order: unit number -> the bytes that belong
at its start. A piece may be shorter than a unit, where the chunk ended; what was appended later
lies behind it in the block. Invariant: an overlay never reaches behind the committed end, so
appends in place never meet it; `trim` records of truncations keep that true after a replay.
"""

from dataclasses import dataclass, field

from emberfs.proto.ids import ChunkId
from emberfs.storage.records import NO_TRIM, UNIT_BYTES, RedoRecord

Overlay = dict[int, memoryview]


def units_of(redo: RedoRecord) -> Overlay:
    """Split redo data into units without copying."""
    view = memoryview(redo.data)
    return {
        redo.first + at // UNIT_BYTES: view[at : at + UNIT_BYTES]
        for at in range(0, len(view), UNIT_BYTES)
    }


@dataclass(slots=True, eq=False)
class RedoLog:
    """The committed redo data of one block."""

    chunk: ChunkId
    block: int
    versions: list[int] = field(default_factory=list)  # R rows in the store, rising
    overlay: Overlay = field(default_factory=dict)
    overlay_bytes: int = 0
    applied: int = 0  # rows up to this version are in the block, perhaps not yet stable

    def add(self, version: int, redo: RedoRecord) -> None:
        """Fold in the row of a newly committed version."""
        assert not self.versions or self.versions[-1] < version
        self.versions.append(version)
        if redo.trim != NO_TRIM:
            self._trim(redo.trim)
        for unit, piece in units_of(redo).items():
            self._put(unit, piece)

    def _trim(self, length: int) -> None:
        for unit in [u for u in self.overlay if u * UNIT_BYTES + len(self.overlay[u]) > length]:
            self._put(unit, self.overlay[unit][: max(0, length - unit * UNIT_BYTES)])

    def _put(self, unit: int, piece: memoryview) -> None:
        old = self.overlay.pop(unit, None)
        self.overlay_bytes += len(piece) - (len(old) if old is not None else 0)
        if len(piece):
            self.overlay[unit] = piece

    def settle(self, written: Overlay, version: int) -> None:
        """The pieces of `written`, the overlay of `version`, are in the block now."""
        for unit, piece in written.items():
            if self.overlay.get(unit) is piece:
                self._put(unit, piece[:0])
        self.applied = version

    def applied_versions(self) -> list[int]:
        """Return the versions whose rows are not needed once the block is stable."""
        return [version for version in self.versions if version <= self.applied]

    def forget(self, versions: list[int]) -> None:
        """The rows of these oldest versions are deleted."""
        assert self.versions[: len(versions)] == versions
        del self.versions[: len(versions)]


def patch(target: memoryview, start: int, overlay: Overlay) -> None:
    """Lay overlay pieces over `target`, chunk content from `start` (a multiple of a unit)."""
    stop = start + len(target)
    units = range(start // UNIT_BYTES, -(-stop // UNIT_BYTES))
    if len(overlay) < len(units):
        numbers = [unit for unit in list(overlay) if unit in units]
    else:
        numbers = [unit for unit in units if unit in overlay]
    for unit in numbers:
        piece = overlay.get(unit)
        if piece is None:  # applied meanwhile: the caller's checksum tells
            continue
        at = unit * UNIT_BYTES - start
        room = min(len(piece), len(target) - at)
        target[at : at + room] = piece[:room]


def runs_of(overlay: Overlay) -> list[tuple[int, list[memoryview]]]:
    """Return contiguous runs as (offset in the chunk, pieces in order)."""
    runs: list[tuple[int, list[memoryview]]] = []
    end = -1
    for unit in sorted(overlay):
        piece, at = overlay[unit], unit * UNIT_BYTES
        if at == end and len(runs[-1][1]) < 512:  # below IOV_MAX
            runs[-1][1].append(piece)
        else:
            runs.append((at, [piece]))
        end = at + len(piece)
    return runs
