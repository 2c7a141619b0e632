"""Which version of a chunk a read may see [pure].

A replica without a pending version holds what the tail has committed (invariants in craq.py), so it
answers at once. With one, only the tail knows whether the pending version is committed. The tail
itself knows, unless its pending version was forwarded to (or received before) another tail: then
that one may have committed it and shown it to a reader, and the read waits until it is committed
here too. Thus no reader ever sees an older version after anyone has seen a newer one.
"""

from enum import IntEnum

from emberfs.storage.chunk_events import State
from emberfs.storage.view import View


class ReadPlan(IntEnum):
    """How to find the version to read."""

    COMMITTED = 1  # what is committed here
    ASK_TAIL = 2  # ask the tail, then settle_read
    WAIT = 3  # until the operation in work, or the leftover, is committed


def plan_read(state: State | None, exposed: bool, view: View) -> ReadPlan:
    """Decide for a serving replica. `exposed`: the pending version may be committed elsewhere."""
    if state is None or state.pending is None:
        return ReadPlan.COMMITTED
    if not view.tail_here:
        return ReadPlan.ASK_TAIL
    return ReadPlan.WAIT if exposed else ReadPlan.COMMITTED


ABSENT = -1  # settle_read: the tail has removed the chunk
AGAIN = -2  # settle_read: things moved meanwhile, begin anew


def settle_read(state: State | None, tail_version: int) -> int:
    """Choose by the tail's committed version: a version to read, ABSENT or AGAIN.

    `state` is read after the tail's answer, without a pause in between.
    """
    if state is None or state.pending is None:
        return AGAIN  # committed meanwhile: plan_read will say so
    pending = state.pending
    if pending.version == state.version:
        return AGAIN  # a replacement of equal number: wait until it is committed
    if pending.removes:
        if tail_version == 0:
            return ABSENT
    elif pending.version == tail_version:
        return tail_version
    if state.version == tail_version:
        return state.version if tail_version else ABSENT
    return AGAIN
