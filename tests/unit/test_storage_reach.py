"""How long a node has been silent, and what counts as an answer."""

import pytest

from emberfs.proto.ids import MS, SECOND, NodeId
from emberfs.storage.reach import OVERDUE_NS, UNREACHABLE_NS, Reach

NODE, OTHER = NodeId(11), NodeId(12)
START_NS = 10**15


def test_silence_counts_from_the_first_call_that_nobody_answered() -> None:
    reach = Reach()
    reach.sent(NODE, START_NS)  # still open, as a forward to a node that hangs
    assert reach.doubtful(START_NS + OVERDUE_NS) == []
    assert reach.doubtful(START_NS + OVERDUE_NS + 1) == [NODE]
    ping = reach.sent(NODE, START_NS + SECOND)
    assert not reach.unreachable(START_NS + 2 * UNREACHABLE_NS), "nothing has been lost yet"
    reach.lost(ping)
    assert not reach.unreachable(START_NS + UNREACHABLE_NS - 1)
    assert reach.unreachable(START_NS + UNREACHABLE_NS) == {NODE}


def test_any_answer_clears_a_node() -> None:
    reach = Reach()
    reach.lost(reach.sent(NODE, START_NS))
    late_ns = START_NS + 10 * SECOND
    assert reach.unreachable(late_ns) == {NODE}
    assert reach.doubtful(late_ns) == [NODE], "pinged until it answers"
    reach.answered(reach.sent(NODE, late_ns), late_ns)
    assert not reach.unreachable(late_ns + 60 * SECOND)
    assert reach.doubtful(late_ns) == []


def test_a_long_call_is_no_silence_while_others_are_answered() -> None:
    """A chunk of 64 MiB over a slow link takes seconds; pings pass beside it."""
    reach = Reach()
    reach.sent(NODE, START_NS)
    for second in range(1, 9):
        now_ns = START_NS + second * SECOND
        reach.answered(reach.sent(NODE, now_ns), now_ns)
        assert not reach.unreachable(now_ns)
    now_ns = START_NS + 9 * SECOND
    reach.lost(reach.sent(NODE, now_ns))
    assert not reach.unreachable(now_ns + UNREACHABLE_NS - SECOND - 1), "heard at 8 s"
    assert reach.unreachable(now_ns + UNREACHABLE_NS) == {NODE}


def test_a_caller_that_gives_up_says_nothing() -> None:
    reach = Reach()
    reach.given_up(reach.sent(NODE, START_NS))
    assert reach.doubtful(START_NS + 9 * SECOND) == []


@pytest.mark.parametrize("kept", [(), (OTHER,)])
def test_the_dead_are_forgotten(kept: tuple[NodeId, ...]) -> None:
    """A node that comes back is not blamed for the time in which it was dead."""
    reach = Reach()
    for node in (NODE, OTHER):
        reach.lost(reach.sent(node, START_NS))
    reach.keep(kept)
    assert reach.unreachable(START_NS + 9 * SECOND) == set(kept)
    reach.lost(reach.sent(NODE, START_NS + 9 * SECOND))
    assert NODE not in reach.unreachable(START_NS + 9 * SECOND + 100 * MS)
