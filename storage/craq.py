"""One chunk on one replica: the CRAQ protocol as a machine [pure].

After Terrace & Freedman, "Object Storage on CRAQ" (USENIX ATC 2009), with whole chains that commit
only when every writable replica has the update (write-all).

Two rules. Everything that moves a chunk's version lives in this file; and what must survive
`kill -9` stands before what is sent: a replica forwards an update only after its own copy is
pending in the store, and answers only after it has committed. From these follow the invariants
that reads (readrule.py) and recovery (resync.py) stand on, for neighbours P (predecessor) and S:
    S has an update pending or committed  =>  P has it pending or committed;
    P has an update committed             =>  S has it committed.
So a replica without a pending version holds exactly what the tail has committed.

The machine is at the same time the chunk's FIFO lock: operations queue in the order of arrival and
one of them owns the chunk from its start to its end. It exists only while something is queued.

    client update:  (finish leftover) -> dedupe -> PREPARE -> FORWARD -> COMMIT -> reply
    from a hop:     dedupe / gap / take over -> PREPARE -> FORWARD -> COMMIT -> reply
    last replica:   ... -> PREPARE (with commit, one batch) -> reply
    leftover:       a pending version without an owner (restart, dead predecessor): FORWARD its
                    whole content -> COMMIT; started by whoever is head or last serving
    hold:           somebody else needs the chunk to stand still (recovery transfer, repair)

An update that has been prepared is never given up while this target is writable: forwards are
repeated, to whoever is the successor then. It ends by commit, by a refusal for want of space that
is certain to have left no trace further down, or by this target losing its place; then the pending
version stays in the store as a leftover, or is replaced when the predecessor sends another one or
the target is filled again. PREPARE replaces it in one step of the store: somebody may have shown
what is pending here, so until the new version is there nothing may look as if it were not.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from emberfs.proto.errors import Code
from emberfs.proto.ids import MS, TargetId
from emberfs.proto.storage_calls import RememberedWrite, UpdateKind, UpdateRequest, WriteTag
from emberfs.storage.chunk_events import (
    Abandoned,
    CancelForward,
    Commit,
    Committed,
    Discard,
    Discarded,
    Effect,
    Event,
    Forward,
    ForwardAnswered,
    ForwardFailed,
    Granted,
    HoldArrived,
    Pause,
    Pending,
    Prepare,
    Prepared,
    Repair,
    Repaired,
    Reply,
    ResumeArrived,
    RetryDue,
    RoutingChanged,
    State,
    StoreFailed,
    UpdateArrived,
)
from emberfs.storage.remembering import recall, remember
from emberfs.storage.view import NOBODY, View

QUEUED_MAX = 512  # operations that wait for one chunk
RETRY_FIRST_NS = 25 * MS
RETRY_MAX_NS = 300 * MS

# Codes after which the successor needs the whole content instead of the change.
WANTS_CONTENT = frozenset({Code.VERSION_GAP, Code.CHECKSUM})


class Phase(IntEnum):
    """Where an operation stands."""

    QUEUED = 0
    PREPARE = 1  # the store works
    REPAIR = 2  # another replica is asked for good data
    FORWARD = 3  # the successor works
    PAUSE = 4  # before the next attempt
    COMMIT = 5  # the store works
    DISCARD = 6  # the store works
    HELD = 7


@dataclass(slots=True)
class _Operation:
    """Something that owns the chunk or waits for it."""

    keys: list[int]  # who waits for the outcome; the first one holds the payload
    request: UpdateRequest | None  # None for holds and leftovers
    hold: bool = False
    phase: Phase = Phase.QUEUED
    version: int = 0
    length: int = 0
    attempt: int = 0
    sent_to: TargetId = NOBODY
    tries: int = 0  # since the last change of routing
    whole: bool = False  # the successor asked for the whole content
    doubtful: bool = False  # an attempt of unknown outcome was made: some successor may have it
    repaired: bool = False
    as_serving: bool = False  # begun while this target was SERVING
    failure: tuple[Code, str] | None = None


@dataclass(slots=True)
class ChunkMachine:
    """All operations on one chunk at one replica. `handle` alone mutates it."""

    view: View
    state: State | None
    tombstone: tuple[RememberedWrite, ...] = ()  # while the chunk is absent: who wrote it before
    exposed: bool = False  # the version in work may be committed further down the chain
    _queue: deque[_Operation] = field(default_factory=deque)
    _current: _Operation | None = None
    _attempts: int = 0

    def __post_init__(self) -> None:
        """Take a leftover for what it may be."""
        # A leftover may have been committed and read further down the chain.
        self.exposed = self.state is not None and self.state.pending is not None

    @property
    def idle(self) -> bool:
        """True when the machine can be dropped."""
        return self._current is None and not self._queue

    @property
    def has_leftover(self) -> bool:
        """True while a version is pending that no operation is going to end."""
        pending = self.state.pending if self.state is not None else None
        return pending is not None and (self._current is None or self._current.hold)

    def handle(self, event: Event, now_ns: int) -> list[Effect]:
        """Take one event; the effects are to be performed in the order of the list."""
        effects: list[Effect] = []
        _HANDLERS[type(event)](self, event, effects)
        while self._current is None and self._queue:
            self._begin(self._queue.popleft(), effects)
        return effects

    def check(self) -> None:
        """Assert the machine's invariants: for tests and the simulator."""
        current = self._current
        assert current is not None or not self._queue, "waiting for nobody"
        if current is not None:
            assert current.phase != Phase.QUEUED
            assert (current.phase == Phase.HELD) == current.hold
            if current.phase in (Phase.FORWARD, Phase.PAUSE, Phase.COMMIT, Phase.DISCARD):
                pending = self.state.pending if self.state is not None else None
                assert pending is not None
                assert pending.version == current.version
        assert all(op.phase == Phase.QUEUED for op in self._queue)

    # -------------------------------------------------------- arrivals

    def _on_update(self, event: UpdateArrived, effects: list[Effect]) -> None:
        refusal = self._refusal(event.request)
        if refusal is not None:
            effects.append(Reply(event.key, *refusal, 0, 0))
            return
        twin = self._twin(event.request)
        if twin is not None and twin.phase == Phase.QUEUED:
            twin.request = event.request  # the newest names the newest chain version
            twin.keys.insert(0, event.key)
        elif twin is not None:
            twin.keys.append(event.key)
        elif len(self._queue) >= QUEUED_MAX:
            effects.append(Reply(event.key, Code.BUSY, "too many updates of one chunk", 0, 0))
        else:
            self._queue.append(_Operation([event.key], event.request))

    def _on_hold(self, event: HoldArrived, effects: list[Effect]) -> None:
        self._queue.append(_Operation([event.key], None, hold=True))

    def _on_resume(self, event: ResumeArrived, effects: list[Effect]) -> None:
        current = self._current
        if current is not None and current.request is None and not current.hold:
            current.keys.append(event.key)
        else:
            self._queue.append(_Operation([event.key], None))

    def _on_abandoned(self, event: Abandoned, effects: list[Effect]) -> None:
        current = self._current
        if current is not None and event.key in current.keys:
            if current.hold:
                self._current = None
            elif current.keys[0] != event.key:  # the first one's payload is in use
                current.keys.remove(event.key)
                effects.append(Reply(event.key, Code.CANCELLED, "the caller has gone", 0, 0))
            return
        for operation in self._queue:
            if event.key in operation.keys:
                operation.keys.remove(event.key)
                if not operation.keys:
                    self._queue.remove(operation)
                if not operation.hold:
                    effects.append(Reply(event.key, Code.CANCELLED, "the caller has gone", 0, 0))
                return

    def _twin(self, request: UpdateRequest) -> _Operation | None:
        """Find the same update, in flight or waiting: its outcome is the answer."""
        if request.kind == UpdateKind.REPLACE:
            return None
        for operation in (self._current, *self._queue):
            other = operation.request if operation is not None else None
            if (
                other is not None
                and other.tag == request.tag
                and other.kind == request.kind
                and (other.version == request.version or 0 in (other.version, request.version))
            ):
                return operation
        return None

    def _refusal(self, request: UpdateRequest) -> tuple[Code, str] | None:
        """Say why this target may not take the request as the chain stands."""
        view = self.view
        if not view.writable:
            return Code.NOT_SERVING, f"target {view.target} is {view.public.name}"
        if request.chain_version != view.chain_version:
            return (
                Code.CHAIN_VERSION,
                f"chain {view.chain} is at version {view.chain_version} here, "
                f"the request says {request.chain_version}",
            )
        if request.version == 0 and not (view.serving and view.head):
            return Code.NOT_HEAD, f"target {view.target} is not the head of chain {view.chain}"
        return None

    # -------------------------------------------------------- beginning

    def _begin(self, operation: _Operation, effects: list[Effect]) -> None:
        if operation.hold:
            operation.phase = Phase.HELD
            self._current = operation
            effects.append(Granted(operation.keys[0]))
        elif operation.request is None:
            self._begin_leftover(operation, effects)
        elif (refusal := self._refusal(operation.request)) is not None:
            self._answer(operation, refusal, effects)
        elif operation.request.version == 0:
            self._begin_client(operation, operation.request, effects)
        elif operation.request.kind == UpdateKind.REPLACE:
            remembered = operation.request.remembered
            self._take(operation, operation.request.version, remembered, effects)
        else:
            self._begin_hop(operation, operation.request, effects)

    def _begin_leftover(self, operation: _Operation, effects: list[Effect]) -> None:
        """Finish a pending version that nobody owns; other replicas may have committed it."""
        pending = self.state.pending if self.state is not None else None
        if pending is None:
            self._answer(operation, None, effects)
            return
        if not self.view.serving:
            text = f"target {self.view.target} is {self.view.public.name}"
            self._answer(operation, (Code.NOT_SERVING, text), effects)
            return
        self._own(operation)
        operation.version, operation.length = pending.version, pending.length
        operation.doubtful = operation.whole = True
        self.exposed = True
        self._move_on(operation, effects)

    def _begin_client(
        self, operation: _Operation, request: UpdateRequest, effects: list[Effect]
    ) -> None:
        if self.state is not None and self.state.pending is not None:
            self._queue.appendleft(operation)
            self._begin_leftover(_Operation([], None), effects)
            return
        last = recall(self._remembered(), request.tag)
        version = self.state.version if self.state is not None else 0
        if last is not None and last.sequence >= request.tag.sequence:
            if last.sequence == request.tag.sequence:
                operation.version, operation.length = last.version, self._length()
                self._answer(operation, None, effects)
            else:
                text = f"write {request.tag.sequence} came after {last.sequence} of its channel"
                self._answer(operation, (Code.SUPERSEDED, text), effects)
        else:
            # Also the removal of an absent chunk is a version: that it was done must be remembered.
            self._take(operation, version + 1, self._with(request.tag, version + 1), effects)

    def _begin_hop(
        self, operation: _Operation, request: UpdateRequest, effects: list[Effect]
    ) -> None:
        version = self.state.version if self.state is not None else 0
        pending = self.state.pending if self.state is not None else None
        last = recall(self._remembered(), request.tag)
        gone = request.kind == UpdateKind.REMOVE and self.state is None
        if (request.version == version or gone) and last is not None and self._is(last, request):
            operation.version, operation.length = request.version, self._length()
            self._answer(operation, None, effects)  # its answer was lost on the way
        elif request.version != version + 1 or self._was_seen(request):
            # Either we differ from our predecessor, who then sends the whole content, or this is
            # a late duplicate, whose answer nobody waits for.
            text = f"version {request.version} does not follow {version}"
            self._answer(operation, (Code.VERSION_GAP, text), effects)
        elif pending is not None and self._continues(pending, request):
            self._own(operation)
            operation.version, operation.length = pending.version, pending.length
            operation.whole = pending.kind == UpdateKind.REPLACE
            operation.doubtful = True
            self.exposed = True
            self._move_on(operation, effects)
        else:
            remembered = self._with(request.tag, request.version)
            self._take(operation, request.version, remembered, effects)

    def _continues(self, pending: Pending, request: UpdateRequest) -> bool:
        """Tell whether our pending version is this very update, sent again."""
        last = recall(pending.remembered, request.tag)
        return pending.version == request.version and last is not None and self._is(last, request)

    def _is(self, last: RememberedWrite, request: UpdateRequest) -> bool:
        return last.sequence == request.tag.sequence and last.version == request.version

    def _was_seen(self, request: UpdateRequest) -> bool:
        """Tell whether the writer has come further here: before the chunk was removed, too.

        Versions begin anew after a removal, so a late duplicate may have the right one by chance.
        """
        last = recall(self._remembered(), request.tag)
        return last is not None and last.sequence >= request.tag.sequence

    def _take(
        self,
        operation: _Operation,
        version: int,
        remembered: tuple[RememberedWrite, ...],
        effects: list[Effect],
    ) -> None:
        """Write the update into the store. A pending version of ours gives way to it there."""
        assert operation.request is not None
        self._own(operation)
        operation.phase = Phase.PREPARE
        operation.version = version
        if self.state is not None and self.state.pending is not None:
            operation.doubtful = True  # it may be this very update, and forwarded already
        effects.append(
            Prepare(
                operation.keys[0],
                operation.request,
                version,
                remembered,
                commit=self.view.successor == NOBODY,
            )
        )

    def _own(self, operation: _Operation) -> None:
        self._current = operation
        operation.as_serving = self.view.serving

    def _lost_place(self, operation: _Operation) -> bool:
        """Tell whether it is not for us any more to carry the operation to its end.

        A target that was SERVING and is SYNCING now has been out of the chain meanwhile: what it
        commits binds nobody, so it must not be acknowledged.
        """
        return not self.view.writable or (operation.as_serving and not self.view.serving)

    def _remembered(self) -> tuple[RememberedWrite, ...]:
        """What the committed state remembers, or what is left of a removed chunk's memory."""
        if self.state is not None and self.state.version:
            return self.state.remembered
        return self.tombstone

    def _with(self, tag: WriteTag, version: int) -> tuple[RememberedWrite, ...]:
        return remember(self._remembered(), tag, version)

    def _length(self) -> int:
        return self.state.length if self.state is not None else 0

    # -------------------------------------------------------- the store's answers

    def _on_prepared(self, event: Prepared, effects: list[Effect]) -> None:
        operation = self._working(Phase.PREPARE)
        assert event.state.pending is not None
        self.state = event.state
        operation.length = event.state.pending.length
        self._move_on(operation, effects)

    def _on_committed(self, event: Committed, effects: list[Effect]) -> None:
        operation = self._working(Phase.PREPARE, Phase.COMMIT)
        self.state, self.tombstone = event.state, event.tombstone
        operation.length = self._length()
        self._finish(operation, None, effects)

    def _on_discarded(self, event: Discarded, effects: list[Effect]) -> None:
        operation = self._working(Phase.DISCARD)
        self.state = event.state
        self._finish(operation, operation.failure, effects)

    def _on_store_failed(self, event: StoreFailed, effects: list[Effect]) -> None:
        operation = self._working(Phase.PREPARE, Phase.COMMIT, Phase.DISCARD)
        self.state = event.state
        head = operation.request is not None and operation.request.version == 0
        damaged = event.code == Code.CHECKSUM and operation.phase == Phase.PREPARE
        if head and damaged and not operation.repaired:
            operation.phase, operation.repaired = Phase.REPAIR, True
            effects.append(Repair())
        elif event.code == Code.NO_SPACE and self._may_be_elsewhere(operation):
            text = f"the update waits for room, other replicas may have it: {event.message}"
            self._finish(operation, (Code.BUSY, text), effects)
        else:
            self._finish(operation, (event.code, event.message), effects)

    def _may_be_elsewhere(self, operation: _Operation) -> bool:
        """Tell whether the update was forwarded, or stays pending here and will be.

        NO_SPACE tells a predecessor that nobody has it from here on: it gives the update up.
        """
        return operation.phase != Phase.PREPARE or operation.doubtful

    def _on_repaired(self, event: Repaired, effects: list[Effect]) -> None:
        operation = self._working(Phase.REPAIR)
        self.state = event.state
        self._current = None
        if event.healed:
            operation.phase = Phase.QUEUED
            self._begin(operation, effects)
        else:
            self._answer(operation, (Code.CHECKSUM, event.message), effects)

    # -------------------------------------------------------- forwarding

    def _move_on(self, operation: _Operation, effects: list[Effect]) -> None:
        """The update is pending here: what does the chain, as it is now, want next?"""
        view = self.view
        if self._lost_place(operation):
            text = f"target {view.target} is {view.public.name}; its update stays pending"
            self._finish(operation, (Code.NOT_SERVING, text), effects)
        elif view.successor == NOBODY:
            operation.phase = Phase.COMMIT
            effects.append(Commit(operation.version))
        else:
            self._forward(operation, effects)

    def _forward(self, operation: _Operation, effects: list[Effect]) -> None:
        view = self.view
        self._attempts += 1
        operation.phase = Phase.FORWARD
        operation.attempt = self._attempts
        operation.sent_to = view.successor
        request = operation.request
        replaced = request is not None and request.kind == UpdateKind.REPLACE
        whole = (view.successor_syncing or operation.whole) and not replaced
        # Even a syncing successor may be the tail by now, in a chain that we do not know yet.
        self.exposed = True
        effects.append(
            Forward(
                operation.keys[0] if operation.keys else 0,
                request,
                operation.attempt,
                view.successor,
                view.chain_version,
                operation.version,
                whole,
            )
        )

    def _on_forward_answered(self, event: ForwardAnswered, effects: list[Effect]) -> None:
        operation = self._awaiting(event.attempt, Phase.FORWARD)
        if operation is None:
            return
        if self._lost_place(operation):
            self._move_on(operation, effects)
            return
        operation.phase = Phase.COMMIT
        effects.append(Commit(operation.version))

    def _on_forward_failed(self, event: ForwardFailed, effects: list[Effect]) -> None:
        operation = self._awaiting(event.attempt, Phase.FORWARD)
        if operation is None:
            return
        if self._lost_place(operation) or self.view.successor == NOBODY:
            self._move_on(operation, effects)
        elif event.code == Code.NO_SPACE and not operation.doubtful:
            operation.phase = Phase.DISCARD
            operation.failure = (event.code, event.message)
            effects.append(Discard())
        elif event.code in WANTS_CONTENT and not operation.whole:
            operation.whole = True
            self._forward(operation, effects)
        else:
            operation.doubtful = True
            self._pause(operation, effects)

    def _pause(self, operation: _Operation, effects: list[Effect]) -> None:
        operation.phase = Phase.PAUSE
        pause_ns = min(RETRY_FIRST_NS << min(operation.tries, 8), RETRY_MAX_NS)
        operation.tries += 1
        effects.append(Pause(operation.attempt, pause_ns))

    def _on_retry_due(self, event: RetryDue, effects: list[Effect]) -> None:
        operation = self._awaiting(event.attempt, Phase.PAUSE)
        if operation is not None:
            self._move_on(operation, effects)

    def _on_routing(self, event: RoutingChanged, effects: list[Effect]) -> None:
        self.view = event.view
        operation = self._current
        if operation is None:
            return
        if operation.phase == Phase.FORWARD:
            same = operation.sent_to == event.view.successor
            if same and not self._lost_place(operation):
                return  # the answer, or its refusal, is still to come
            operation.doubtful = True
            effects.append(CancelForward(operation.attempt))
            operation.tries = 0
            self._move_on(operation, effects)
        elif operation.phase == Phase.PAUSE:
            operation.doubtful = operation.doubtful or operation.sent_to != event.view.successor
            operation.tries = 0
            self._move_on(operation, effects)

    # -------------------------------------------------------- ends

    def _finish(
        self, operation: _Operation, failure: tuple[Code, str] | None, effects: list[Effect]
    ) -> None:
        assert operation is self._current
        self._current = None
        self.exposed = self.state is not None and self.state.pending is not None
        self._answer(operation, failure, effects)
        if operation.request is None and failure is not None:
            while self._queue:  # they would only run into the same leftover again
                self._answer(self._queue.popleft(), failure, effects)

    def _answer(
        self, operation: _Operation, failure: tuple[Code, str] | None, effects: list[Effect]
    ) -> None:
        code, message = failure if failure is not None else (None, "")
        version, length = operation.version, operation.length
        effects.extend(Reply(key, code, message, version, length) for key in operation.keys)

    def _working(self, *phases: Phase) -> _Operation:
        assert self._current is not None
        assert self._current.phase in phases
        return self._current

    def _awaiting(self, attempt: int, phase: Phase) -> _Operation | None:
        """Return the operation that this attempt belongs to, None if it has moved on."""
        current = self._current
        if current is not None and current.phase == phase and current.attempt == attempt:
            return current
        return None


_HANDLERS: dict[type, Callable[[ChunkMachine, Any, list[Effect]], None]] = {
    UpdateArrived: ChunkMachine._on_update,
    HoldArrived: ChunkMachine._on_hold,
    ResumeArrived: ChunkMachine._on_resume,
    Abandoned: ChunkMachine._on_abandoned,
    RoutingChanged: ChunkMachine._on_routing,
    Prepared: ChunkMachine._on_prepared,
    Committed: ChunkMachine._on_committed,
    Discarded: ChunkMachine._on_discarded,
    StoreFailed: ChunkMachine._on_store_failed,
    ForwardAnswered: ChunkMachine._on_forward_answered,
    ForwardFailed: ChunkMachine._on_forward_failed,
    RetryDue: ChunkMachine._on_retry_due,
    Repaired: ChunkMachine._on_repaired,
}
