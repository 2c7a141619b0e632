"""Mutations of recovery: what a target believes of itself, filling, inventories, repair."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from emberfs.proto.ids import ChunkId
from emberfs.proto.storage_calls import UpdateKind
from emberfs.storage import filling, hosted, resync
from emberfs.storage import target as condition
from emberfs.storage.chunks import ChunkStore
from emberfs.storage.filling import Recovery
from emberfs.storage.repair import Repairer
from emberfs.storage.replica import TargetReplica
from emberfs.storage.service import StorageService
from sim.mutations import WRONG, Patch, mutation


@mutation("power", WRONG)
def old_data_is_trusted(patch: Patch) -> None:
    """After a power cut, or with an empty disk, a target goes on as if it had everything."""
    patch.set(hosted, "Opened", lambda doubtful, blank: condition.Opened(doubtful=False))


@mutation("power, blackout", f"not durable, {WRONG}")
def doubt_is_forgotten_by_a_restart(patch: Patch) -> None:
    """A target that has lost something and dies before it is filled is trusted from then on."""

    def make(original: Any) -> Any:
        def write_format(self: Any, **options: Any) -> None:
            self._doubtful = False
            original(self, **options)

        return write_format

    patch.wrap(ChunkStore, "_write_format", make)


@mutation("power, outage", WRONG)
def blank_disk_stands_in(patch: Patch) -> None:
    """A target with an empty directory may bring its chain back."""
    patch.set(hosted, "Opened", lambda doubtful, blank: condition.Opened(doubtful, blank=False))


@mutation("gentle, processes, power", WRONG)
def recovery_sends_nothing(patch: Patch) -> None:
    """A recovery is called complete before anything was sent."""

    async def send_all(self: Any, view: Any, transfers: Any) -> list[Any]:
        return []

    patch.set(Recovery, "_send_all", send_all)


@mutation("gentle, processes, outage", WRONG)
def recovery_leaves_removed_chunks(patch: Patch) -> None:
    """Chunks that were removed meanwhile stay where they are."""

    def make(original: Any) -> Any:
        def compare(own: Any, theirs: Any, stop: bytes) -> Any:
            mine = [row for row in own if row.version or row.pending]
            here = {row.chunk for row in mine}
            return original(mine, [row for row in theirs if row.chunk in here], stop)

        return compare

    patch.wrap(filling, "compare", make)


@mutation("outage, blackout, everything", WRONG)
def successor_ahead_is_left_alone(patch: Patch) -> None:
    """A chunk of which the target has a higher version is not replaced."""

    def make(original: Any) -> Any:
        def equal(here: Any, there: Any) -> bool:
            return bool(original(here, there)) or there.version > here.version

        return equal

    patch.wrap(resync, "_equal", make)


@mutation("hot recovery, outage", WRONG)
def content_is_not_compared(patch: Patch) -> None:
    """Equal versions are taken for equal contents."""
    patch.set(resync, "_equal", lambda here, there: here.version == there.version)


@mutation("hot recovery, processes", WRONG)
def pending_there_is_left(patch: Patch) -> None:
    """An older pending write at the target is overlooked by a recovery."""

    def equal(here: Any, there: Any) -> bool:
        return bool(here.version == there.version and here.digest == there.digest)

    patch.set(resync, "_equal", equal)
    patch.set(TargetReplica, "has_leftovers", property(lambda self: False))


@mutation("hot recovery, everything", WRONG)
def recovery_takes_no_lock(patch: Patch) -> None:
    """A chunk is sent to the target while updates of it go on."""

    @asynccontextmanager
    async def hold(self: Any, chunk: ChunkId) -> AsyncIterator[None]:
        yield

    patch.set(TargetReplica, "hold", hold)


@mutation("processes, everything", f"{WRONG}, still pending")
def completion_of_another_chain_counts(patch: Patch) -> None:
    """Once filled, a target calls itself complete in every later recovery."""

    def settle(self: Any, found: Any) -> Any:
        usable = (condition.Condition.ONLINE, condition.Condition.UPTODATE)
        if found == condition.Condition.DISTRUSTED or found in usable:
            return condition.Condition.UPTODATE
        return found

    patch.set(condition.TargetState, "_settle", settle)


@mutation("gentle, processes", "no exit, no start, error at a client")
def recovery_never_ends(patch: Patch) -> None:
    """The target does not hear that its recovery is complete."""

    def make(original: Any) -> Any:
        async def tell(self: Any, view: Any, *, done: bool) -> None:
            await original(self, view, done=False)

        return tell

    patch.wrap(Recovery, "_tell", make)


@mutation("blackout", "not durable, lost, replicas differ, stale")
def recovery_is_not_flushed(patch: Patch) -> None:
    """A target calls itself complete before what it received is stable."""

    def make(original: Any) -> Any:
        async def sync(self: Any, call: Any) -> Any:
            async def nothing(self: Any) -> None:
                pass

            flush, TargetReplica.flush = TargetReplica.flush, nothing  # type: ignore[method-assign]
            try:
                return await original(self, call)
            finally:
                TargetReplica.flush = flush  # type: ignore[method-assign]

        return sync

    patch.wrap(StorageService, "sync", make)


@mutation("disk", WRONG)
def repair_empties_the_chunk(patch: Patch) -> None:
    """A damaged chunk is replaced by zeros instead of another replica's content."""

    async def fetch(self: Any, replica: Any, chunk: Any, wanted: Any, source: Any) -> None:
        replica.store.prepare_and_commit(
            chunk,
            UpdateKind.REPLACE,
            version=wanted.version,
            offset=0,
            length=wanted.length,
            data=memoryview(bytes(wanted.length)),
            chunk_bytes=1 << 26,
            remembered=wanted.remembered,
        )

    patch.set(Repairer, "fetch", fetch)


@mutation("hot recovery, gentle", WRONG)
def wrong_chunk_is_sent(patch: Patch) -> None:
    """A recovery sends what is committed under a version that is one too low."""

    def make(original: Any) -> Any:
        async def send(self: Any, store: Any, chunk: Any, state: Any, *args: Any, **kw: Any) -> Any:
            if state is not None and state.version > 1:
                state = msgspec.structs.replace(state, version=state.version - 1)
            return await original(self, store, chunk, state, *args, **kw)

        return send

    patch.wrap(filling.Sender, "send_committed", make)


@mutation("hot recovery, losses", WRONG)
def older_updates_are_not_waited_for(patch: Patch) -> None:
    """A recovery begins while updates of the chain of before are still in work."""

    async def settled(self: Any) -> None:
        pass

    patch.set(TargetReplica, "settled", settled)


@mutation("losses", WRONG)
def a_blank_disk_is_forgotten_by_a_restart(patch: Patch) -> None:
    """A directory that was never filled counts as complete once it has a format."""

    def note_blank(env: Any, path: str) -> bool:
        return not env.disk.exists(f"{path}/format")

    patch.set(hosted, "note_blank", note_blank)
