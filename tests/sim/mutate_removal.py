"""Mutations of removals: what is remembered of those who wrote a chunk that is gone."""

from typing import Any

from emberfs.proto.storage_calls import UpdateKind
from emberfs.storage import filling
from emberfs.storage.craq import ChunkMachine
from emberfs.storage.forward import Sender
from emberfs.storage.tombstones import Burial, Tombstones
from sim.mutations import WRONG, Patch, mutation


@mutation("messages, late messages", WRONG)
def removed_chunks_forget_their_writers(patch: Patch) -> None:
    """Nothing is remembered of who wrote a chunk that was removed."""
    patch.set(Tombstones, "of", lambda self, chunk: ())


@mutation("processes", WRONG)
def tombstones_are_in_memory(patch: Patch) -> None:
    """Who wrote a removed chunk is remembered until the process ends."""
    _write_instead(patch, lambda self, changes: [])


@mutation("processes", WRONG)
def tombstones_wait_for_the_next_removal(patch: Patch) -> None:
    """Who wrote a removed chunk is stored by the batch of the removal that comes after it."""

    def changes_of_before(self: Any, changes: Any) -> Any:
        before, self.waiting = getattr(self, "waiting", []), changes
        return before

    _write_instead(patch, changes_of_before)


def _write_instead(patch: Patch, choose: Any) -> None:
    """A removal writes what `choose` makes of its rows; memory has all of them."""

    def make(original: Any) -> Any:
        def bury(self: Any, chunk: Any, writers: Any) -> Burial | None:
            found = original(self, chunk, writers)
            if found is None:
                return None
            _known(self)[chunk] = writers
            return Burial(found.chunk, found.at_ms, found.dropped, choose(self, found.changes))

        return bury

    patch.wrap(Tombstones, "bury", make)
    patch.set(Tombstones, "of", lambda self, chunk: _known(self).get(chunk, ()))


def _known(tombstones: Any) -> Any:
    return vars(tombstones).setdefault("in_memory", {})


@mutation("hot recovery, processes", WRONG)
def absent_chunks_are_not_compared(patch: Patch) -> None:
    """A recovery does not tell who wrote chunks that neither side has."""

    def make(original: Any) -> Any:
        def compare(own: Any, theirs: Any, stop: bytes) -> Any:
            return original([row for row in own if row.version or row.pending], theirs, stop)

        return compare

    patch.wrap(filling, "compare", make)


@mutation("hot recovery, processes", WRONG)
def removals_are_sent_without_their_writers(patch: Patch) -> None:
    """A recovery says that a chunk is gone, and not who wrote it."""

    def make(original: Any) -> Any:
        async def send(self: Any, *args: Any, **options: Any) -> None:
            given = options["remembered"] if options["exists"] else ()
            await original(self, *args, **{**options, "remembered": given})

        return send

    patch.wrap(Sender, "_send_content", make)


@mutation("messages", f"{WRONG}, late write")
def removals_of_nothing_are_forgotten(patch: Patch) -> None:
    """The removal of an absent chunk is answered without being remembered."""

    def make(original: Any) -> Any:
        def begin(self: Any, operation: Any, request: Any, effects: list[Any]) -> None:
            if request.kind == UpdateKind.REMOVE and self.state is None:
                self._answer(operation, None, effects)
            else:
                original(self, operation, request, effects)

        return begin

    patch.wrap(ChunkMachine, "_begin_client", make)
