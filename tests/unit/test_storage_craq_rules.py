"""The chunk machine step by step, and the table of reads."""

import pytest

from emberfs.proto.cluster import PublicState
from emberfs.proto.errors import Code
from emberfs.proto.ids import ChainId, ChainVersion, ChunkId, TargetId
from emberfs.proto.storage_calls import RememberedWrite, UpdateKind, UpdateRequest, WriteTag
from emberfs.storage import chunk_events as ev
from emberfs.storage.chunks import ChunkState, PendingState
from emberfs.storage.craq import ChunkMachine
from emberfs.storage.readrule import ABSENT, AGAIN, ReadPlan, plan_read, settle_read
from emberfs.storage.remembering import REMEMBERED_MAX, recall, remember
from emberfs.storage.view import NOBODY, View

ME, NEXT, TAIL = TargetId(1), TargetId(2), TargetId(3)
WRITE, REMOVE, REPLACE = UpdateKind.WRITE, UpdateKind.REMOVE, UpdateKind.REPLACE


def view(
    version: int = 1,
    *,
    head: bool = True,
    successor: TargetId = NEXT,
    syncing: bool = False,
    public: PublicState = PublicState.SERVING,
    tail: TargetId = TAIL,
) -> View:
    return View(ME, ChainId(1), ChainVersion(version), public, head, successor, syncing, tail)


def request(
    kind: UpdateKind = WRITE,
    *,
    sequence: int = 1,
    version: int = 0,
    chain: int = 1,
    client: int = 9,
) -> UpdateRequest:
    tag = WriteTag(client, 1, sequence)
    return UpdateRequest(
        ME, ChainVersion(chain), ChunkId(bytes(12)), kind, 0, 4, tag, 65536, 0, version
    )


def state(
    version: int,
    pending: PendingState | None = None,
    remembered: tuple[RememberedWrite, ...] = (),
) -> ChunkState:
    return ChunkState(version, 4, 0, remembered, pending)


def waiting(
    version: int, kind: UpdateKind = WRITE, sequence: int = 1, client: int = 9
) -> PendingState:
    row = RememberedWrite(client, 1, sequence, version)
    return PendingState(version, kind, 4, (row,), kind == REMOVE)


def kinds(effects: list[ev.Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def arrive(machine: ChunkMachine, update: UpdateRequest, key: int = 1) -> list[ev.Effect]:
    effects = machine.handle(ev.UpdateArrived(key, update), 0)
    machine.check()
    return effects


def test_o7_a_write_is_durable_here_before_it_is_sent_and_committed_after_the_successor() -> None:
    """A write is committed only after the successor has committed it."""
    machine = ChunkMachine(view(), state(4))
    (prepare,) = arrive(machine, request())
    assert (prepare.version, prepare.commit) == (5, False)
    (forward,) = machine.handle(ev.Prepared(state(4, waiting(5))), 0)
    assert (forward.successor, forward.version, forward.whole) == (NEXT, 5, False)
    (commit,) = machine.handle(ev.ForwardAnswered(forward.attempt), 0)
    assert commit == ev.Commit(5)
    (reply,) = machine.handle(ev.Committed(state(5)), 0)
    assert reply == ev.Reply(1, None, "", 5, 4)
    assert machine.idle


def test_the_last_replica_commits_in_one_step() -> None:
    machine = ChunkMachine(view(head=False, successor=NOBODY), state(4))
    (prepare,) = arrive(machine, request(version=5))
    assert prepare.commit
    assert kinds(machine.handle(ev.Committed(state(5)), 0)) == ["Reply"]


@pytest.mark.parametrize(
    ("seen", "update", "code"),
    [
        (view(2), request(), Code.CHAIN_VERSION),
        (view(), request(chain=2), Code.CHAIN_VERSION),
        (view(head=False), request(), Code.NOT_HEAD),
        (view(public=PublicState.SYNCING, head=False), request(), Code.NOT_HEAD),
        (view(public=PublicState.OFFLINE), request(version=5), Code.NOT_SERVING),
        (view(public=PublicState.WAITING), request(), Code.NOT_SERVING),
        (view(head=False), request(version=7), Code.VERSION_GAP),
        (view(head=False), request(version=3), Code.VERSION_GAP),
    ],
)
def test_refusals(seen: View, update: UpdateRequest, code: Code) -> None:
    machine = ChunkMachine(seen, state(4))
    (reply,) = arrive(machine, update)
    assert reply.code == code
    assert machine.idle


def test_exactly_once_at_the_head() -> None:
    remembered = (RememberedWrite(9, 1, 10, 4),)
    for sequence, code, version in ((10, None, 4), (9, Code.SUPERSEDED, 0)):
        machine = ChunkMachine(view(), state(6, None, remembered))
        (reply,) = arrive(machine, request(sequence=sequence))
        assert (reply.code, reply.version) == (code, version)
    machine = ChunkMachine(view(), state(6, None, remembered))
    assert kinds(arrive(machine, request(sequence=11))) == ["Prepare"]
    assert arrive(machine, request(sequence=11), key=2) == []  # waits for the same outcome
    machine.handle(ev.Prepared(state(6, waiting(7))), 0)
    machine.handle(ev.ForwardAnswered(1), 0)
    replies = machine.handle(ev.Committed(state(7)), 0)
    assert [(r.key, r.version) for r in replies] == [(1, 7), (2, 7)]


@pytest.mark.parametrize(
    ("have", "update", "expected"),
    [
        # the answer was lost: already committed
        (state(5, None, (RememberedWrite(9, 1, 1, 5),)), request(version=5), ["Reply"]),
        # the same update again: go on with what is pending
        (state(4, waiting(5)), request(version=5), ["Forward"]),
        # another update of the same number: the predecessor is authoritative
        (state(4, waiting(5, client=8)), request(version=5), ["Prepare"]),
        (state(4, waiting(5)), request(REPLACE, version=5), ["Prepare"]),
        # replacements have any number
        (state(4), request(REPLACE, version=2), ["Prepare"]),
        (None, request(REPLACE, version=9), ["Prepare"]),
        # an absent chunk's removal is a version, too
        (None, request(REMOVE, version=1), ["Prepare"]),
    ],
)
def test_hop(have: ChunkState | None, update: UpdateRequest, expected: list[str]) -> None:
    machine = ChunkMachine(view(head=False), have)
    effects = arrive(machine, update)
    assert kinds(effects) == expected
    assert all(e.code is None for e in effects if isinstance(e, ev.Reply))


def started(seen: View, have: int = 4, update: UpdateRequest | None = None) -> ChunkMachine:
    """A machine whose first forward (attempt 1) is under way."""
    machine = ChunkMachine(seen, state(have))
    arrive(machine, update or request())
    machine.handle(ev.Prepared(state(have, waiting(have + 1))), 0)
    machine.check()
    return machine


def test_a_failed_forward_is_repeated_until_the_chain_changes() -> None:
    machine = started(view())
    pauses = []
    for attempt in range(1, 7):
        (pause,) = machine.handle(ev.ForwardFailed(attempt, Code.TIMEOUT, ""), 0)
        pauses.append(pause.duration_ns)
        (forward,) = machine.handle(ev.RetryDue(attempt), 0)
        assert forward.attempt == attempt + 1
    assert pauses == sorted(pauses)
    assert max(pauses) <= 300_000_000
    effects = machine.handle(ev.RoutingChanged(view(2, successor=TAIL)), 0)
    assert kinds(effects) == ["CancelForward", "Forward"]
    assert (effects[1].successor, effects[1].chain_version) == (TAIL, 2)
    assert machine.handle(ev.ForwardAnswered(3), 0) == []  # an older attempt
    assert kinds(machine.handle(ev.RoutingChanged(view(3, successor=NOBODY)), 0)) == [
        "CancelForward",
        "Commit",
    ]


@pytest.mark.parametrize("public", [PublicState.OFFLINE, PublicState.WAITING, PublicState.SYNCING])
def test_losing_its_place_ends_an_update_without_success(public: PublicState) -> None:
    machine = started(view())
    lost = view(2, public=public, head=False, successor=NOBODY)
    effects = machine.handle(ev.RoutingChanged(lost), 0)
    assert kinds(effects) == ["CancelForward", "Reply"]
    assert effects[1].code == Code.NOT_SERVING
    assert machine.exposed


def test_no_space_further_down_is_told_unless_someone_may_have_committed() -> None:
    machine = started(view())
    assert machine.handle(ev.ForwardFailed(1, Code.NO_SPACE, "full"), 0) == [ev.Discard()]
    (reply,) = machine.handle(ev.Discarded(state(4)), 0)
    assert reply.code == Code.NO_SPACE
    machine = started(view())
    machine.handle(ev.RoutingChanged(view(2, successor=TAIL)), 0)
    assert kinds(machine.handle(ev.ForwardFailed(2, Code.NO_SPACE, "full"), 0)) == ["Pause"]


@pytest.mark.parametrize("code", [Code.VERSION_GAP, Code.CHECKSUM])
def test_a_successor_that_differs_gets_the_whole_content(code: Code) -> None:
    machine = started(view())
    (forward,) = machine.handle(ev.ForwardFailed(1, code, ""), 0)
    assert forward.whole
    assert kinds(machine.handle(ev.ForwardFailed(2, code, ""), 0)) == ["Pause"]


@pytest.mark.parametrize("kind", [WRITE, UpdateKind.TRUNCATE, REMOVE])
def test_r3_a_syncing_successor_gets_the_whole_content(kind: UpdateKind) -> None:
    machine = ChunkMachine(view(syncing=True), state(4))
    arrive(machine, request(kind))
    (forward,) = machine.handle(ev.Prepared(state(4, waiting(5, kind))), 0)
    assert forward.whole


def test_a_leftover_is_finished_before_the_next_write() -> None:
    machine = ChunkMachine(view(), state(4, waiting(5, client=8)))
    (forward,) = arrive(machine, request())
    assert (forward.request, forward.version, forward.whole) == (None, 5, True)
    assert machine.handle(ev.ForwardAnswered(1), 0) == [ev.Commit(5)]
    (prepare,) = machine.handle(ev.Committed(state(5)), 0)
    assert prepare.version == 6


def test_a_leftover_that_cannot_be_finished_fails_who_waits_behind_it() -> None:
    machine = ChunkMachine(view(successor=NOBODY), state(4, waiting(5, client=8)))
    assert arrive(machine, request()) == [ev.Commit(5)]
    failed = ev.StoreFailed(state(4, waiting(5, client=8)), Code.DISK, "EIO")
    assert [e.code for e in machine.handle(failed, 0)] == [Code.DISK]
    assert machine.idle


def test_c10_s5_late_duplicates_after_a_removal() -> None:
    """A late duplicate does not bring a removed chunk back."""
    machine = ChunkMachine(view(successor=NOBODY), state(4, None, (RememberedWrite(9, 1, 7, 4),)))
    (prepare,) = arrive(machine, request(REMOVE, client=5))
    machine.handle(ev.Committed(None, prepare.remembered), 0)
    assert recall(machine.tombstone, WriteTag(9, 1, 7)) is not None
    again = ChunkMachine(view(successor=NOBODY), None, machine.tombstone)
    (reply,) = arrive(again, request(sequence=6))
    assert reply.code == Code.SUPERSEDED
    hop = ChunkMachine(view(head=False), None, machine.tombstone)
    (reply,) = arrive(hop, request(sequence=6, version=1))
    assert reply.code == Code.VERSION_GAP  # a living predecessor then sends the content
    assert kinds(arrive(again, request(sequence=8))) == ["Prepare"]


def test_c10_a_removal_whose_answer_was_lost_is_answered_again() -> None:
    """By a hop as by the head; what is another removal leads to the whole content."""
    tombstone = (RememberedWrite(5, 1, 1, 9),)
    hop = ChunkMachine(view(head=False), None, tombstone)
    (reply,) = arrive(hop, request(REMOVE, client=5, version=9))
    assert (reply.code, reply.version) == (None, 9)
    (reply,) = arrive(hop, request(REMOVE, client=6, version=9))
    assert reply.code == Code.VERSION_GAP
    (reply,) = arrive(ChunkMachine(view(), None, tombstone), request(REMOVE, client=5))
    assert (reply.code, reply.version) == (None, 9)


def test_c10_the_removal_of_an_absent_chunk_is_remembered() -> None:
    """Else an older write of the same channel, given up by then, would be done after it."""
    machine = ChunkMachine(view(successor=NOBODY), None)
    (prepare,) = arrive(machine, request(REMOVE, sequence=7))
    assert prepare.version == 1
    machine.handle(ev.Committed(None, prepare.remembered), 0)
    (reply,) = arrive(machine, request(sequence=6), key=2)
    assert reply.code == Code.SUPERSEDED


def test_the_queue_is_first_in_first_out_and_holds_exclude_updates() -> None:
    machine = ChunkMachine(view(successor=NOBODY), state(4))
    arrive(machine, request())
    assert machine.handle(ev.HoldArrived(2), 0) == []
    assert arrive(machine, request(client=8), key=3) == []
    effects = machine.handle(ev.Committed(state(5)), 0)
    assert kinds(effects) == ["Reply", "Granted"]
    assert kinds(machine.handle(ev.Abandoned(2), 0)) == ["Prepare"]
    assert machine.handle(ev.Abandoned(3), 0) == []  # its payload is in use: it stays
    assert kinds(machine.handle(ev.Committed(state(6)), 0)) == ["Reply"]


def test_a_leftover_is_one_while_somebody_holds_the_chunk() -> None:
    """Else a recovery counts as complete because a repair stands behind the update that ended."""
    machine = started(view(public=PublicState.SERVING))
    assert not machine.has_leftover
    machine.handle(ev.HoldArrived(9), 0)
    lost = view(2, public=PublicState.SYNCING, head=False, successor=NOBODY)
    assert kinds(machine.handle(ev.RoutingChanged(lost), 0)) == [
        "CancelForward",
        "Reply",
        "Granted",
    ]
    assert not machine.idle
    assert machine.has_leftover
    owned = ChunkMachine(view(successor=NOBODY), state(4, waiting(5)))
    owned.handle(ev.ResumeArrived(1), 0)
    assert not owned.has_leftover


def test_who_has_gone_before_its_turn_leaves_no_trace() -> None:
    machine = ChunkMachine(view(successor=NOBODY), state(4))
    arrive(machine, request())
    arrive(machine, request(client=8), key=2)
    (reply,) = machine.handle(ev.Abandoned(2), 0)
    assert reply.code == Code.CANCELLED
    assert kinds(machine.handle(ev.Committed(state(5)), 0)) == ["Reply"]
    assert machine.idle


def test_a_damaged_chunk_is_repaired_before_the_update_at_the_head() -> None:
    machine = ChunkMachine(view(), state(4))
    arrive(machine, request())
    broken = ev.StoreFailed(state(4), Code.CHECKSUM, "")
    assert machine.handle(broken, 0) == [ev.Repair()]
    assert kinds(machine.handle(ev.Repaired(state(4), True, ""), 0)) == ["Prepare"]
    (reply,) = machine.handle(broken, 0)
    assert reply.code == Code.CHECKSUM


def test_r1_an_equal_version_is_replaced_by_what_the_predecessor_has() -> None:
    """Whatever a replica holds at the same version, the predecessor's content takes its place."""
    same = state(5, None, (RememberedWrite(9, 1, 1, 5),))
    for have in (same, state(4, waiting(5, client=8)), state(5, waiting(6, client=8))):
        machine = ChunkMachine(view(head=False, successor=NOBODY), have)
        prepare = arrive(machine, request(REPLACE, version=5))[-1]
        assert isinstance(prepare, ev.Prepare)
        assert (prepare.version, prepare.commit) == (5, True)


@pytest.mark.parametrize("version", [1, 5, 9])
def test_r2_a_successor_that_is_ahead_takes_the_older_content(version: int) -> None:
    """A target in recovery takes what its predecessor has, also when it is older than its own."""
    seen = view(public=PublicState.SYNCING, head=False, successor=NOBODY)
    machine = ChunkMachine(seen, state(8, waiting(9)))
    prepare = arrive(machine, request(REPLACE, version=version))[-1]
    assert isinstance(prepare, ev.Prepare)
    assert prepare.version == version


def test_r3_a_change_for_a_chain_that_became_syncing_meanwhile_is_sent_whole() -> None:
    """An update that was under way when the successor became SYNCING reaches it in full."""
    for kind in (WRITE, UpdateKind.TRUNCATE, REMOVE):
        machine = ChunkMachine(view(), state(4))
        arrive(machine, request(kind))
        machine.handle(ev.Prepared(state(4, waiting(5, kind))), 0)
        syncing = view(2, successor=TargetId(7), syncing=True, tail=ME)
        forward = machine.handle(ev.RoutingChanged(syncing), 0)[-1]
        assert isinstance(forward, ev.Forward)
        assert forward.whole


def test_c10_a_late_duplicate_that_fits_a_chunk_written_anew_is_refused() -> None:
    """Versions begin anew after a removal: the number alone does not admit an old update."""
    newer = (RememberedWrite(9, 1, 12, 4),)
    hop = ChunkMachine(view(head=False), state(4, None, newer))
    (reply,) = arrive(hop, request(sequence=7, version=5))
    assert reply.code == Code.VERSION_GAP
    assert kinds(arrive(hop, request(sequence=13, version=5))) == ["Prepare"]


def test_remembered_is_bounded_and_keeps_the_newest() -> None:
    remembered: tuple[RememberedWrite, ...] = ()
    for client in range(40):
        remembered = remember(remembered, WriteTag(client, 1, 5), client + 1)
    assert [row.client for row in remembered] == list(range(39, 39 - REMEMBERED_MAX, -1))
    assert remember(remembered, WriteTag(39, 1, 6), 41)[1].client == 38


@pytest.mark.parametrize(
    ("have", "exposed", "tail", "plan"),
    [
        (None, False, TAIL, ReadPlan.COMMITTED),
        (state(4), True, TAIL, ReadPlan.COMMITTED),
        (state(4, waiting(5)), False, TAIL, ReadPlan.ASK_TAIL),
        (state(4, waiting(5)), True, TAIL, ReadPlan.ASK_TAIL),
        (state(4, waiting(5)), False, ME, ReadPlan.COMMITTED),
        (state(4, waiting(5)), True, ME, ReadPlan.WAIT),
    ],
)
def test_plan_read(have: ChunkState | None, exposed: bool, tail: TargetId, plan: ReadPlan) -> None:
    assert plan_read(have, exposed, view(tail=tail)) == plan


@pytest.mark.parametrize(
    ("have", "tail_version", "expected"),
    [
        (state(4, waiting(5)), 4, 4),
        (state(4, waiting(5)), 5, 5),
        (state(4, waiting(5)), 6, AGAIN),
        (state(4, waiting(5)), 0, AGAIN),
        (state(5), 5, AGAIN),
        (None, 5, AGAIN),
        (state(0, waiting(1)), 0, ABSENT),
        (state(0, waiting(1)), 1, 1),
        (state(4, waiting(5, REMOVE)), 0, ABSENT),
        (state(4, waiting(5, REMOVE)), 4, 4),
        (state(4, waiting(4, REPLACE)), 4, AGAIN),
    ],
)
def test_settle_read(have: ChunkState | None, tail_version: int, expected: int) -> None:
    assert settle_read(have, tail_version) == expected


def test_s11_no_room_to_commit_is_no_refusal_since_the_successors_have_it() -> None:
    """When a hop has no room for the commit, nobody before it may give the update up.

    Found by simulation (mood disk, seed 10148): the head discarded what the tail had committed and
    shown; later a scrub took it back.
    """
    machine = ChunkMachine(view(head=False), state(4))
    arrive(machine, request(version=5))
    (forward,) = machine.handle(ev.Prepared(state(4, waiting(5))), 0)
    assert machine.handle(ev.ForwardAnswered(forward.attempt), 0) == [ev.Commit(5)]
    failed = ev.StoreFailed(state(4, waiting(5)), Code.NO_SPACE, "full")
    (reply,) = machine.handle(failed, 0)
    assert reply.code == Code.BUSY


def test_s11_no_room_after_an_attempt_of_unknown_outcome_gives_nothing_up() -> None:
    """A successor without room may have passed on an earlier attempt whose answer was lost."""
    machine = ChunkMachine(view(), state(4))
    arrive(machine, request())
    (forward,) = machine.handle(ev.Prepared(state(4, waiting(5))), 0)
    assert kinds(machine.handle(ev.ForwardFailed(1, Code.TIMEOUT, "lost"), 0)) == ["Pause"]
    (forward,) = machine.handle(ev.RetryDue(1), 0)
    full = ev.ForwardFailed(forward.attempt, Code.NO_SPACE, "full")
    assert kinds(machine.handle(full, 0)) == ["Pause"]
