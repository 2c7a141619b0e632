"""What the scrubber does next, and who is right when two replicas differ [pure].

A pass walks all chunks of a target in order. Its place is kept on disk now and then, so that a
restart goes on instead of beginning anew; what lies between the last note and the crash is verified
twice. The next pass begins `interval` after the end of the last one, by the time of day: a clock
that was wrong moves a pass by at most one interval.

    here \\ there        absent    present
    absent              -         fetch
    present             send      damaged on either side: mended there by itself
                                  higher version wins; equal versions with other content: we are
                                  the predecessor, hence right

Present wins over absent: a chunk that was kept by mistake is found by fsck and collected, one that
was deleted by mistake is lost.
"""

from collections.abc import Sequence
from enum import Enum

import msgspec

from emberfs.proto.ids import ChunkId
from emberfs.proto.storage_calls import ChunkRow
from emberfs.storage.resync import END


class Note(msgspec.Struct, frozen=True):
    """What the file `scrub` of a target's directory holds."""

    position: str = ""  # hex: where the pass in work goes on; empty between passes
    finished_s: int = 0  # when the last whole pass ended, seconds since 1970; 0: never


class Verdict(Enum):
    """What to do about a chunk that two neighbours hold; we are the predecessor."""

    SAME = "same"
    BUSY = "changing"  # look again in the next pass
    SEND = "ours is right"
    FETCH = "theirs is right"
    MEND = "damaged"  # with its own checksums as witness


def wait_s(note: Note, interval_s: int, now_s: int) -> int:
    """Seconds until the next pass may begin or go on."""
    if note.position or not note.finished_s:
        return 0
    return min(interval_s, max(0, note.finished_s + interval_s - now_s))


def judge(here: ChunkRow | None, there: ChunkRow | None) -> Verdict:
    """Compare a chunk on both sides of a link in the chain."""
    if any(row is not None and row.pending for row in (here, there)):
        return Verdict.BUSY
    ours = here.version if here is not None else 0
    theirs = there.version if there is not None else 0
    if any(row is not None and row.damaged for row in (here, there)):
        return Verdict.MEND
    if ours != theirs:
        return Verdict.SEND if ours > theirs else Verdict.FETCH
    if here is None or there is None:
        return Verdict.SAME
    same = (here.length, here.digest) == (there.length, there.digest)
    return Verdict.SAME if same else Verdict.SEND


def differing(own: Sequence[ChunkRow], theirs: Sequence[ChunkRow], stop: bytes) -> list[ChunkId]:
    """Chunks before `stop` that need a closer look, in order."""
    mine = {row.chunk: row for row in own if stop == END or row.chunk < stop}
    others = {row.chunk: row for row in theirs if stop == END or row.chunk < stop}
    quiet = (Verdict.SAME, Verdict.BUSY)
    return [
        ChunkId(chunk)
        for chunk in sorted(mine.keys() | others.keys())
        if judge(mine.get(chunk), others.get(chunk)) not in quiet
    ]
