"""Replacing damaged data from another replica of the chain."""

import logging
from collections.abc import Callable

from emberfs.fabric.buffers import BufferPool
from emberfs.proto.cluster import Chain
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import CHUNK_BYTES_MIN, ChainId, ChunkId, TargetId
from emberfs.proto.storage_calls import ChunkRow, UpdateKind
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet
from emberfs.storage.lasting import run_thread_to_end
from emberfs.storage.links import BUFFER_TIMEOUT_NS, Links
from emberfs.storage.metrics import DAMAGED, REPAIRS
from emberfs.storage.replica import TargetReplica

log = logging.getLogger("emberfs.storage.repair")


class Repairer:
    """Repairs chunks of all targets of this process; of one chunk once at a time."""

    def __init__(
        self,
        env: Env,
        links: Links,
        buffers: BufferPool,
        chain_of: Callable[[ChainId], Chain | None],
        tasks: TaskSet,
    ) -> None:
        self._env = env
        self._links = links
        self._buffers = buffers
        self._chain_of = chain_of
        self._tasks = tasks
        self._in_work: set[tuple[TargetId, ChunkId]] = set()

    def damaged(self, replica: TargetReplica, chunk: ChunkId) -> None:
        """A read met a checksum error: repair in the background."""
        if (replica.target, chunk) not in self._in_work:
            DAMAGED.inc()
            self._in_work.add((replica.target, chunk))
            self._tasks.spawn(self._in_background(replica, chunk), name="repair")

    async def _in_background(self, replica: TargetReplica, chunk: ChunkId) -> None:
        try:
            async with replica.hold(chunk):
                await self.repair(replica, chunk)
        except EmberfsError as problem:
            log.warning(
                "target %d: chunk %s stays damaged: %s", replica.target, chunk.hex(), problem
            )
        finally:
            self._in_work.discard((replica.target, chunk))

    async def repair(self, replica: TargetReplica, chunk: ChunkId) -> None:
        """Fetch the committed version elsewhere and put it in place; the caller owns the chunk.

        Raises CHECKSUM when nobody else has it, BUSY when a pending version stands in the way.
        """
        state = replica.store.state(chunk)
        if state is None or not state.version:
            return
        if state.pending is not None:
            raise EmberfsError(Code.BUSY, "its pending version must be committed first")
        chain = self._chain_of(replica.view.chain)
        others = chain.serving() if chain is not None else ()
        tried: list[str] = []
        for other in others:
            if other.target == replica.target or chain is None:
                continue
            try:
                row = ChunkRow(
                    chunk, state.version, 0, state.length, 0, remembered=state.remembered
                )
                await self.fetch(replica, chunk, row, other.target)
            except EmberfsError as problem:
                tried.append(f"target {other.target}: {problem}")
                continue
            REPAIRS.inc()
            log.warning(
                "target %d: chunk %s was damaged, repaired from target %d",
                replica.target,
                chunk.hex(),
                other.target,
            )
            return
        why = "; ".join(tried) or "the chain has no other complete replica"
        raise EmberfsError(Code.CHECKSUM, f"damaged and not repaired: {why}")

    async def fetch(
        self, replica: TargetReplica, chunk: ChunkId, wanted: ChunkRow, source: TargetId
    ) -> None:
        """Put what `source` has committed in place of ours; the caller owns the chunk.

        Raises VERSION_GAP when it has another version than `wanted`, or why it cannot be read.
        """
        version, length = wanted.version, wanted.length
        buffer = await self._buffers.take_within(max(length, 1), BUFFER_TIMEOUT_NS)
        try:
            result = await self._links.read_chunk(source, replica.view.chain_version, chunk, buffer)
            if result.version != version or result.length != length:
                text = f"has version {result.version}, wanted {version}"
                raise EmberfsError(Code.VERSION_GAP, text)

            def work() -> None:
                replica.store.prepare_and_commit(
                    chunk,
                    UpdateKind.REPLACE,
                    version=version,
                    offset=0,
                    length=length,
                    data=buffer.view[:length],
                    chunk_bytes=max(
                        CHUNK_BYTES_MIN, 1 << (length - 1).bit_length() if length else 0
                    ),
                    remembered=wanted.remembered,
                )

            await run_thread_to_end(self._env, work)
            replica.flusher.dirty = True
        finally:
            self._buffers.give(buffer)
