"""What a target reports, for every condition and every state its chain may give it."""

import pytest

from emberfs.proto.cluster import Chain, ChainTarget, LocalState, PublicState
from emberfs.proto.ids import ChainId, ChainVersion, NodeId, TargetId
from emberfs.storage.target import (
    Condition,
    DiskFailed,
    FinishLeftovers,
    Opened,
    ReportNow,
    RoutingChanged,
    SyncCompleted,
    TargetState,
    ViewChanged,
)
from emberfs.storage.view import absent_view, view_of

ME, OTHER = TargetId(101), TargetId(201)
S, L, Y, W, O = PublicState  # noqa: E741


def routing(state: PublicState | None, version: int = 1) -> RoutingChanged:
    """A chain with another serving target behind (or before) us; None: we are no member."""
    other = ChainTarget(OTHER, NodeId(2), S)
    mine = (ChainTarget(ME, NodeId(1), state),) if state is not None else ()
    members = (*mine, other) if state == S else (other, *mine)
    return RoutingChanged(view_of(Chain(ChainId(1), ChainVersion(version), members), ME))


def opened_in(state: PublicState | None, event: Opened) -> TargetState:
    target = TargetState(ME)
    target.handle(routing(state), 0)
    target.handle(event, 0)
    return target


@pytest.mark.parametrize(
    ("state", "trusted", "doubtful", "blank"),
    [
        (S, Condition.UPTODATE, Condition.DISTRUSTED, Condition.DISTRUSTED),
        (Y, Condition.ONLINE, Condition.DISTRUSTED, Condition.DISTRUSTED),
        (W, Condition.ONLINE, Condition.DISTRUSTED, Condition.DISTRUSTED),
        (L, Condition.ONLINE, Condition.ONLINE, Condition.DISTRUSTED),
        (O, Condition.ONLINE, Condition.ONLINE, Condition.ONLINE),
        (None, Condition.ONLINE, Condition.ONLINE, Condition.ONLINE),
    ],
)
def test_after_start(
    state: PublicState | None, trusted: Condition, doubtful: Condition, blank: Condition
) -> None:
    assert opened_in(state, Opened(doubtful=False)).condition == trusted
    assert opened_in(state, Opened(doubtful=True)).condition == doubtful
    assert opened_in(state, Opened(doubtful=False, blank=True)).condition == blank


@pytest.mark.parametrize("state", [S, L, Y, W, O, None])
def test_up_to_date_only_while_serving(state: PublicState | None) -> None:
    target = opened_in(S, Opened(doubtful=False))
    target.handle(routing(state, 2), 0)
    expected = LocalState.UPTODATE if state == S else LocalState.ONLINE
    assert target.local == expected
    assert target.serves == (state == S)


def test_after_a_power_cut_it_is_filled_again() -> None:
    target = opened_in(S, Opened(doubtful=True))
    assert target.local == LocalState.OFFLINE
    assert "older" in target.reason
    assert not target.view.writable
    target.handle(routing(O, 2), 0)
    assert (target.local, target.reason) == (LocalState.ONLINE, "")
    target.handle(routing(Y, 3), 0)
    assert target.local == LocalState.ONLINE
    assert target.view.writable
    effects = target.handle(SyncCompleted(ChainVersion(3)), 0)
    assert target.local == LocalState.UPTODATE
    assert ReportNow() in effects
    target.handle(routing(S, 4), 0)
    assert target.serves


def test_r12_doubt_is_told_until_it_is_filled_or_the_chain_goes_on_with_it() -> None:
    target = opened_in(S, Opened(doubtful=True))
    for state in (L, O, Y):
        target.handle(routing(state, 2 + state), 0)
        assert target.doubtful
    target.handle(SyncCompleted(ChainVersion(2 + Y)), 0)
    assert not target.doubtful
    target = opened_in(L, Opened(doubtful=True))
    assert (target.local, target.doubtful) == (LocalState.ONLINE, True)
    target.handle(routing(S, 2), 0)
    assert not target.doubtful
    assert not opened_in(L, Opened(doubtful=False)).doubtful


def test_completion_counts_for_its_chain_version_only() -> None:
    target = opened_in(Y, Opened(doubtful=False))
    target.handle(SyncCompleted(ChainVersion(7)), 0)
    assert target.local == LocalState.ONLINE
    target.handle(SyncCompleted(ChainVersion(1)), 0)
    assert target.local == LocalState.UPTODATE
    target.handle(routing(Y, 2), 0)
    assert target.local == LocalState.ONLINE


def test_a_failed_disk_stays_offline() -> None:
    target = opened_in(S, Opened(doubtful=False))
    effects = target.handle(DiskFailed("EIO"), 0)
    assert ViewChanged(absent_view(ME)) in effects
    assert ReportNow() in effects
    for state in (O, Y, S, L):
        target.handle(routing(state, 5), 0)
        target.handle(SyncCompleted(ChainVersion(5)), 0)
        assert (target.local, target.reason) == (LocalState.OFFLINE, "EIO")
        assert not target.view.writable


def test_leftovers_are_finished_by_head_and_tail() -> None:
    target = opened_in(O, Opened(doubtful=False))
    assert FinishLeftovers() not in target.handle(routing(Y, 2), 0)
    assert FinishLeftovers() in target.handle(routing(S, 3), 0)
