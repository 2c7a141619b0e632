"""Mutations of a replica: the chunk machine, forwarding, reads."""

from typing import Any

from emberfs.proto.errors import EmberfsError
from emberfs.storage import chunk_events as ev
from emberfs.storage import craq, reads
from emberfs.storage.craq import ChunkMachine
from emberfs.storage.forward import Sender
from emberfs.storage.hoporder import HopOrder
from emberfs.storage.readrule import ReadPlan
from emberfs.storage.reads import Reader
from emberfs.storage.replica import TargetReplica
from emberfs.storage.service import StorageService
from emberfs.storage.table import PENDING
from sim.mutations import WRONG, Patch, mutation


@mutation("contention, messages", WRONG)
def tail_query_is_skipped(patch: Patch) -> None:
    """A replica with a pending version answers what it has committed, without asking the tail."""
    patch.set(reads, "plan_read", lambda state, exposed, view: ReadPlan.COMMITTED)


@mutation("messages, processes", WRONG)
def pending_version_is_answered(patch: Patch) -> None:
    """A replica answers its pending version before it is committed."""

    async def agree(self: Any, replica: Any, operation: Any, deadline_ns: int) -> int:
        state = replica.store.state(operation.chunk)
        if state is None or state.pending is None:
            return 0
        return reads.ABSENT if state.pending.removes else PENDING

    patch.set(Reader, "_agree", agree)


@mutation("hot recovery, everything", WRONG)
def exposure_is_forgotten(patch: Patch) -> None:
    """A new tail reads over a pending version that a former tail may have shown."""

    def make(original: Any) -> Any:
        return lambda state, exposed, view: original(state, False, view)

    patch.wrap(reads, "plan_read", make)


@mutation("messages, gentle", WRONG)
def commit_before_forward(patch: Patch) -> None:
    """A replica commits its copy before its successor has one."""

    def make(original: Any) -> Any:
        def forward(self: Any, active: Any, effect: Any) -> None:
            if not effect.whole:
                self.store.commit(active.chunk, effect.version)
            original(self, active, effect)

        return forward

    patch.wrap(TargetReplica, "_forward", make)


@mutation("calm, messages", WRONG)
def acknowledged_before_successor(patch: Patch) -> None:
    """A replica acknowledges an update when it has sent it on, without an answer to that."""

    def make(original: Any) -> Any:
        def forward(self: Any, active: Any, effect: Any) -> None:
            original(self, active, effect)
            waiter = self._waiters.get(effect.key)
            if waiter is not None and not waiter.done.done():
                waiter.sending = None
                waiter.done.set_result((effect.version, 0))

        return forward

    patch.wrap(TargetReplica, "_forward", make)


@mutation("calm, messages", WRONG)
def successor_is_left_out(patch: Patch) -> None:
    """Updates are committed without being forwarded."""

    def forward(self: Any, operation: Any, effects: list[Any]) -> None:
        operation.phase = craq.Phase.COMMIT
        effects.append(ev.Commit(operation.version))

    patch.set(ChunkMachine, "_forward", forward)


@mutation("hot recovery, gentle", WRONG)
def syncing_successor_is_left_out(patch: Patch) -> None:
    """A target in recovery does not get the updates that come meanwhile."""

    def make(original: Any) -> Any:
        def forward(self: Any, operation: Any, effects: list[Any]) -> None:
            if not self.view.successor_syncing:
                original(self, operation, effects)
                return
            operation.phase = craq.Phase.COMMIT
            effects.append(ev.Commit(operation.version))

        return forward

    patch.wrap(ChunkMachine, "_forward", make)


@mutation("messages, network", WRONG)
def failed_forward_counts_as_done(patch: Patch) -> None:
    """A forward that failed is not tried again: the update is committed all the same."""

    async def send(self: Any, active: Any, effect: Any, source: Any) -> None:
        try:
            await self._sender.send_change(effect, source)
        except (EmberfsError, OSError):
            pass
        self._feed(active, ev.ForwardAnswered(effect.attempt))

    patch.set(TargetReplica, "_send", send)


@mutation("messages, network, everything", WRONG)
def failed_forward_is_taken_back(patch: Patch) -> None:
    """An update whose forward failed is dropped, though the successor may have it."""

    def failed(self: Any, event: Any, effects: list[Any]) -> None:
        operation = self._awaiting(event.attempt, craq.Phase.FORWARD)
        if operation is not None:
            operation.phase = craq.Phase.DISCARD
            operation.failure = (event.code, event.message)
            effects.append(ev.Discard())

    patch.put(craq._HANDLERS, ev.ForwardFailed, failed)


@mutation("hot recovery, network", WRONG)
def lost_place_is_ignored(patch: Patch) -> None:
    """A target that was out of the chain goes on with the updates of before."""
    patch.set(ChunkMachine, "_lost_place", lambda self, operation: False)


@mutation("hot recovery, network", WRONG)
def chain_version_is_ignored(patch: Patch) -> None:
    """Updates and reads of any chain version are taken, by whoever is asked."""

    def check(self: Any, replica: Any, chain_version: int) -> None:
        pass

    patch.set(Reader, "_check", check)
    patch.set(ChunkMachine, "_refusal", lambda self, request: None)
    patch.set(ChunkMachine, "_lost_place", lambda self, operation: False)


@mutation("messages, aimed", WRONG)
def retries_are_applied_again(patch: Patch) -> None:
    """A chunk does not remember whose write it has applied."""
    patch.set(craq, "recall", lambda remembered, tag: None)
    patch.set(ChunkMachine, "_twin", lambda self, request: None)


@mutation("messages, network", WRONG)
def late_duplicates_are_applied(patch: Patch) -> None:
    """A duplicate that comes after later writes of its channel is applied."""

    def make(original: Any) -> Any:
        def recall(remembered: Any, tag: Any) -> Any:
            last = original(remembered, tag)
            return None if last is not None and last.sequence > tag.sequence else last

        return recall

    patch.wrap(craq, "recall", make)


@mutation("hot recovery, messages", WRONG)
def overtaken_replacements_are_applied(patch: Patch) -> None:
    """A whole chunk that a later one has overtaken is put in place."""
    patch.set(HopOrder, "admit", lambda self, request: True)


@mutation("hot recovery, aimed", WRONG)
def replacements_forget_the_writers(patch: Patch) -> None:
    """A chunk that was sent as a whole does not say whose writes it holds."""

    def make(original: Any) -> Any:
        async def send(self: Any, *args: Any, **options: Any) -> None:
            await original(self, *args, **{**options, "remembered": ()})

        return send

    patch.wrap(Sender, "_send_content", make)


@mutation("two worlds, network", WRONG)
def lease_is_ignored_by_storage(patch: Patch) -> None:
    """A storage node answers reads and writes though its lease has run out."""

    def make(original: Any) -> Any:
        def init(self: Any, *args: Any, **options: Any) -> None:
            original(self, *args, **{**options, "lease_ok": lambda: True})

        return init

    patch.wrap(StorageService, "__init__", make)


@mutation("hot recovery, gentle", WRONG)
def incomplete_replicas_answer_reads(patch: Patch) -> None:
    """Clients read from any member of the chain, and targets that do not serve answer."""
    from emberfs.client.chunkread import ChunkReader

    def serving(self: Any, chain_id: Any) -> Any:
        chain = self._routing.snapshot.chains.get(chain_id)
        return tuple(chain.targets) if chain is not None else ()

    patch.set(ChunkReader, "serving", serving)
    patch.set(Reader, "_check", lambda self, replica, chain_version: None)


@mutation("gentle, processes", "still pending")
def leftovers_stay_pending(patch: Patch) -> None:
    """After a restart nobody rolls the pending versions forward."""

    async def nothing(self: Any, chunk: Any) -> None:
        pass

    patch.set(TargetReplica, "_finish_quietly", nothing)


@mutation("processes, gentle, aimed", WRONG)
def leftovers_are_dropped(patch: Patch) -> None:
    """After a restart pending versions are dropped, though a successor may have committed them."""

    def make(original: Any) -> Any:
        def init(self: Any, env: Any, store: Any, *args: Any) -> None:
            for chunk in store.pending_chunks():
                store.discard(chunk)
            original(self, env, store, *args)

        return init

    patch.wrap(TargetReplica, "__init__", make)


@mutation("messages, network", WRONG)
def tail_answers_what_is_pending(patch: Patch) -> None:
    """Asked for its committed version, the tail names a pending one, also as a former tail."""

    async def version(self: Any, target: Any, chain_version: Any, chunk: Any) -> int:
        state = self._opened(target).store.state(chunk)
        pending = state.pending if state is not None else None
        if pending is not None:
            return 0 if pending.removes else int(pending.version)
        return state.version if state is not None else 0

    patch.set(Reader, "version", version)


@mutation("late messages", WRONG)
def reborn_chunks_are_mistaken(patch: Patch) -> None:
    """A version number of before a removal is taken for one of after it."""
    patch.set(TargetReplica, "life_of", lambda self, chunk: (None, 0))


@mutation("disk", WRONG)
def no_room_for_a_commit_is_a_refusal(patch: Patch) -> None:
    """NO_SPACE of a commit goes back as one of a prepare: nobody further down has the update."""
    patch.set(ChunkMachine, "_may_be_elsewhere", lambda self, operation: False)


@mutation("aimed", WRONG)
def leftovers_give_way_to_new_writes(patch: Patch) -> None:
    """A head overwrites a pending version that it finds, though others may have committed it."""

    async def nothing(self: Any, chunk: Any) -> None:
        pass

    def make(original: Any) -> Any:
        def begin(self: Any, operation: Any, request: Any, effects: list[Any]) -> None:
            state, leftover = self.state, self.state is not None and self.state.pending is not None
            if leftover:
                self.state = _Committed(state)
                effects.append(ev.Discard(last=False))
            original(self, operation, request, effects)

        return begin

    patch.set(TargetReplica, "_finish_quietly", nothing)
    patch.wrap(ChunkMachine, "_begin_client", make)


class _Committed:
    """A chunk's state without what is pending."""

    pending = None

    def __init__(self, state: Any) -> None:
        self.version, self.length, self.remembered = state.version, state.length, state.remembered
