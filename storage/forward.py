"""Sending an update, or the whole content of a chunk, to the successor.

Every message carries its order (see hoporder.py), and a REPLACE has it for a tag, too: nobody's
sequence of writes goes on with it.
"""

import logging

import msgspec

from emberfs.fabric.buffers import BufferPool
from emberfs.fabric.region import Slice
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import CHUNK_BYTES_MIN, ChainVersion, ChunkId, TargetId
from emberfs.proto.storage_calls import RememberedWrite, UpdateKind, UpdateRequest, WriteTag
from emberfs.runtime.checksum import crc32c
from emberfs.runtime.env import Env
from emberfs.storage.chunk_events import Forward, State
from emberfs.storage.lasting import run_thread_to_end
from emberfs.storage.links import BUFFER_TIMEOUT_NS, Links
from emberfs.storage.storeface import Store
from emberfs.storage.table import PENDING

log = logging.getLogger("emberfs.storage.forward")


class OwnDamageError(EmberfsError):
    """The content that was to be sent is damaged here, and a good copy may be elsewhere."""


class Sender:
    """The sending side of one target."""

    def __init__(
        self, env: Env, target: TargetId, links: Links, buffers: BufferPool, life: int
    ) -> None:
        self._env = env
        self._target = target
        self._links = links
        self._buffers = buffers
        self._life = life
        self._sequence = 0

    async def send_change(self, effect: Forward, source: Slice | None) -> None:
        """Forward the update as it came. Raises the successor's answer, or why there is none."""
        request = effect.request
        assert request is not None
        order = self._next_order()
        onward = msgspec.structs.replace(
            request,
            target=effect.successor,
            chain_version=ChainVersion(effect.chain_version),
            version=effect.version,
            tag=order if request.kind == UpdateKind.REPLACE else request.tag,
            order=order,
        )
        await self._links.update(onward, source)

    async def send_pending(
        self, store: Store, chunk: ChunkId, effect: Forward, *, last_copy: bool
    ) -> None:
        """Send our own view of the pending version `effect.version` as a REPLACE.

        `last_copy`: nobody behind us is complete, so damaged content is sent as such; otherwise
        it raises OwnDamageError.
        """
        state = store.state(chunk)
        pending = state.pending if state is not None else None
        if pending is None or pending.version != effect.version:
            raise EmberfsError(Code.INTERNAL, f"version {effect.version} is not pending any more")
        length = 0 if pending.removes else pending.length
        await self._send_content(
            store,
            chunk,
            effect.successor,
            ChainVersion(effect.chain_version),
            version=pending.version,
            reads=PENDING,
            length=length,
            remembered=pending.remembered,
            exists=not pending.removes,
            last_copy=last_copy,
        )

    async def send_committed(
        self,
        store: Store,
        chunk: ChunkId,
        state: State | None,
        successor: TargetId,
        chain_version: ChainVersion,
        *,
        last_copy: bool = False,
    ) -> int:
        """Send our committed version (or absence, with who wrote before) as a REPLACE.

        Return its bytes.

        `last_copy` as in send_pending.
        """
        committed = state if state is not None and state.version else None
        length = committed.length if committed is not None else 0
        await self._send_content(
            store,
            chunk,
            successor,
            chain_version,
            version=committed.version if committed is not None else 1,
            reads=0,
            length=length,
            remembered=committed.remembered if committed is not None else store.tombstone(chunk),
            exists=committed is not None,
            last_copy=last_copy,
        )
        return length

    async def _send_content(
        self,
        store: Store,
        chunk: ChunkId,
        successor: TargetId,
        chain_version: ChainVersion,
        *,
        version: int,
        reads: int,
        length: int,
        remembered: tuple[RememberedWrite, ...],
        exists: bool,
        last_copy: bool,
    ) -> None:
        buffer = await self._take(length) if length else None
        try:
            checksum, checksums, order = 0, b"", self._next_order()
            if buffer is not None:
                checksum, checksums = await self._load(store, chunk, reads, buffer, last_copy)
            request = UpdateRequest(
                target=successor,
                chain_version=chain_version,
                chunk=chunk,
                kind=UpdateKind.REPLACE,
                offset=0,
                length=length,
                tag=order,
                order=order,
                chunk_bytes=max(CHUNK_BYTES_MIN, 1 << (length - 1).bit_length() if length else 0),
                checksum=checksum,
                version=version,
                remembered=remembered,
                exists=exists,
                checksums=checksums,
            )
            await self._links.update(request, buffer)
        finally:
            if buffer is not None:
                self._buffers.give(buffer)

    async def _take(self, length: int) -> Slice:
        return await self._buffers.take_within(length, BUFFER_TIMEOUT_NS)

    async def _load(
        self, store: Store, chunk: ChunkId, version: int, buffer: Slice, last_copy: bool
    ) -> tuple[int, bytes]:
        """Read one version; return its CRC32C, and the checksums that refute damaged content."""

        def work() -> tuple[int, bytes]:
            view = buffer.view
            try:
                outcome = store.read_into(
                    chunk, version=version, offset=0, length=len(view), sink=view
                )
            except EmberfsError as problem:
                if problem.code != Code.CHECKSUM:
                    raise
                if not last_copy:
                    raise OwnDamageError(problem.code, problem.message) from None
                log.error("chunk %s: its last complete copy is damaged; sent as it is", chunk.hex())
                checksums = store.read_damaged(chunk, version=version, sink=view)
                return crc32c(view), checksums
            if outcome.length != len(view):
                text = f"read {outcome.length} of {len(view)} bytes of version {version}"
                raise EmberfsError(Code.INTERNAL, text)
            return crc32c(view), b""

        return await run_thread_to_end(self._env, work)

    def _next_order(self) -> WriteTag:
        self._sequence += 1
        return WriteTag(self._life, self._target, self._sequence)
