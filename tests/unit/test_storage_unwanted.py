"""A target that is asked to leave its chain."""

from emberfs.proto.cluster import LocalState, PublicState
from emberfs.proto.ids import SECOND
from emberfs.storage import target as condition
from emberfs.storage.target import Condition, Opened, ReportNow, Ticked, Unwanted
from unit.test_storage_target_state import ME, routing


def test_it_leaves_at_once_stays_outside_and_comes_back() -> None:
    state = condition.TargetState(ME)
    now_ns = 10**15
    state.handle(Opened(doubtful=False), now_ns)
    state.handle(routing(PublicState.SERVING), now_ns)
    assert state.serves
    effects = state.handle(Unwanted("target 1 does not reach it"), now_ns)
    assert not state.serves, "before anybody else may go on without it"
    assert ReportNow() in effects
    assert state.local == LocalState.OFFLINE
    assert "does not reach" in state.reason
    state.handle(routing(PublicState.OFFLINE, 2), now_ns)
    now_ns += 100 * SECOND
    state.handle(Ticked(), now_ns)
    assert state.condition == Condition.RESTING, "it is still unwanted"
    state.handle(Unwanted(""), now_ns)
    state.handle(Ticked(), now_ns)
    assert state.local == LocalState.ONLINE, "to be filled again"


def test_a_target_without_its_disk_has_nothing_to_leave_with() -> None:
    state = condition.TargetState(ME)
    state.handle(Unwanted("x"), 0)
    assert state.condition == Condition.CLOSED
