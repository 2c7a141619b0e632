"""Mutations of the client library, and of the part of it that services use."""

import itertools
from typing import Any

import msgspec

from emberfs.client import chunkread, chunkwrite
from emberfs.client.agent import Agent
from emberfs.client.chunkwrite import Channels, ChunkWriter
from emberfs.client.routing import Routing
from emberfs.client.writebuffer import WriteBuffer
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ChainVersion
from emberfs.proto.storage_calls import UpdateAnswer
from emberfs.storage.server import StorageServer
from sim.mutate_disk import CUT
from sim.mutations import LINEAR, WRONG, Patch, mutation


@mutation("network, processes, everything", "version went back")
def older_routing_is_taken(patch: Patch) -> None:
    """Whatever snapshot comes is adopted."""

    def make(original: Any) -> Any:
        def offer(self: Any, snapshot: Any) -> bool:
            known = self.snapshot
            if snapshot.version < known.version:
                self.snapshot = msgspec.structs.replace(known, version=0)
            return bool(original(self, snapshot))

        return offer

    def stream(original: Any) -> Any:
        async def follow(self: Any, backoff: Any) -> None:
            self._asked_anew = True
            async for snapshot in self._control.watch(0):
                self.offer(snapshot)

        return follow

    patch.wrap(Routing, "offer", make)
    patch.wrap(Routing, "_stream", stream)


@mutation("messages, network", LINEAR)
def retries_get_new_sequences(patch: Patch) -> None:
    """Every try of an update has a sequence of its own."""
    counter = itertools.count(1)

    def make(original: Any) -> Any:
        def request(**fields: Any) -> Any:
            tag = msgspec.structs.replace(fields["tag"], sequence=next(counter))
            return original(**{**fields, "tag": tag})

        return request

    patch.wrap(chunkwrite, "UpdateRequest", make)


@mutation("network, everything, aimed", LINEAR)
def no_answer_counts_as_done(patch: Patch) -> None:
    """An update whose answer did not come is taken for done."""

    def make(original: Any) -> Any:
        async def call(self: Any, node: Any, method: int, *args: Any, **options: Any) -> Any:
            try:
                return await original(self, node, method, *args, **options)
            except EmberfsError as problem:
                lost = (Code.TIMEOUT, Code.DISCONNECTED, Code.UNREACHABLE)
                if method != chunkwrite.UPDATE.number or problem.code not in lost:
                    raise
                raise _DoneError from None

        return call

    def until(original: Any) -> Any:
        async def until_done(self: Any, update: Any, tag: Any, patience: Any) -> UpdateAnswer:
            try:
                found: UpdateAnswer = await original(self, update, tag, patience)
            except _DoneError:
                return UpdateAnswer(0, 0, ChainVersion(0))
            return found

        return until_done

    patch.wrap(ChunkWriter, "_until_done", until)
    patch.wrap(chunkwrite.NodeCalls, "call", make)


class _DoneError(Exception):
    """Not an error of ours."""


@mutation("two worlds, network", WRONG)
def nodes_do_not_fence_themselves(patch: Patch) -> None:
    """A node that mgmtd does not hear goes on serving."""
    patch.set(Agent, "lease_ok", lambda self: True)


@mutation("two worlds, network", WRONG)
def lease_is_believed_whole(patch: Patch) -> None:
    """A node serves for two leases after its last heartbeat."""

    def make(original: Any) -> Any:
        def renewed(self: Any, lease: Any, sent_ns: int) -> None:
            original(self, lease, sent_ns)
            self._valid_until_ns = sent_ns + 2 * lease.lease_ns

        return renewed

    patch.wrap(Agent, "_renewed", make)


@mutation("network, everything", WRONG)
def old_routing_serves_after_a_lapse(patch: Patch) -> None:
    """A node whose lease had lapsed serves again before it knows the chains of today."""

    def make(original: Any) -> Any:
        def renewed(self: Any, lease: Any, sent_ns: int) -> None:
            original(self, lease, sent_ns)
            self.needs_version = 0

        return renewed

    patch.wrap(Agent, "_renewed", make)
    assert StorageServer


@mutation("calm, gentle", LINEAR)
def short_reads_are_not_cleared(patch: Patch) -> None:
    """What a read finds behind the end of a chunk is left to chance."""
    patch.set(chunkread, "clear", lambda view: None)


@mutation("blackout", CUT)
def flush_asks_the_tail_only(patch: Patch) -> None:
    """A flush makes one replica of each chain stable."""

    def make(original: Any) -> Any:
        async def flush_node(self: Any, node: Any, targets: Any, *rest: Any) -> Any:
            chains = self._routing.snapshot.chains.values()
            tails = [c.tail().target for c in chains if c.tail() is not None]
            mine = [target for target in targets if target in tails]
            return await original(self, node, mine, *rest) if mine else None

        return flush_node

    patch.wrap(ChunkWriter, "_flush_node", make)


@mutation("blackout", CUT)
def flush_ignores_a_blackout(patch: Patch) -> None:
    """Acknowledgements count in whatever life of the replicas they were given."""

    def make(original: Any) -> Any:
        async def flush(self: Any, chains: Any, timeout_ns: int) -> Any:
            return dict.fromkeys(await original(self, chains, timeout_ns), 0)

        return flush

    patch.wrap(ChunkWriter, "flush", make)


@mutation("blackout", CUT)
def losses_amid_a_flush_are_not_seen(patch: Patch) -> None:
    """A flush goes by what its client knew of losses when it began."""

    def make(original: Any) -> Any:
        async def flush(self: Any, chains: Any, timeout_ns: int) -> Any:
            known = self._routing.snapshot.chains
            await original(self, chains, timeout_ns)
            return {chain: known[chain].lost for chain in chains}

        return flush

    patch.wrap(ChunkWriter, "flush", make)


@mutation("files blackout", "file content")
def lost_writes_are_told_to_nobody(patch: Patch) -> None:
    """A file forgets what a flush has told it of a loss."""

    def note_flushed(self: Any, covered: Any, lost: Any) -> None:
        self.unflushed.flushed(covered, lost)

    patch.set(WriteBuffer, "note_flushed", note_flushed)


@mutation("messages, calm", LINEAR)
def checksums_of_answers_are_ignored(patch: Patch) -> None:
    """A read of several replicas mixes their answers: half of a failed one stays."""

    def make(original: Any) -> Any:
        def take(batch: Any, reply: Any) -> Any:
            for job, filled in zip(batch, reply.filled, strict=True):
                chunkread.clear(chunkread.view_of(job.sink)[: filled // 2])
            return original(batch, reply)

        return take

    patch.wrap(chunkread, "_take_results", make)


@mutation("messages", "late write")
def given_up_writes_may_come_late(patch: Patch) -> None:
    """After a write that failed the next one of the chunk uses any channel."""

    def keep(self: Any, chunk: Any, channel: int) -> None:
        self._free.insert(0, channel)
        self._free.append(self._next)
        self._next += 1

    patch.set(Channels, "keep", keep)
