"""Making a replica of a chunk equal to another one, because fsck found them to differ.

Replication itself never needs this. The versions may differ too, so what the source holds is taken
over whole, whatever was here.
"""

import logging

from emberfs.fabric.buffers import BufferPool
from emberfs.fabric.region import Slice
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN
from emberfs.proto.storage_calls import RememberedWrite, RepairRequest, UpdateKind
from emberfs.runtime.env import Env
from emberfs.storage.lasting import run_thread_to_end
from emberfs.storage.links import BUFFER_TIMEOUT_NS, Links
from emberfs.storage.replica import TargetReplica

log = logging.getLogger("emberfs.storage.replace")


async def replace_replica(
    env: Env, replica: TargetReplica, links: Links, buffers: BufferPool, request: RepairRequest
) -> None:
    """Take over the source's version; stable on return. STALE, BUSY, or what the calls raise."""
    _check(replica, request)
    async with replica.hold(request.chunk):
        state = replica.store.state(request.chunk)
        if state is not None and state.pending is not None:
            raise EmberfsError(Code.BUSY, "a pending version must be committed first")
        buffer = await buffers.take_within(max(request.length, 1), BUFFER_TIMEOUT_NS)
        try:
            result = await links.read_chunk(
                request.source, request.chain_version, request.chunk, buffer
            )
            if (result.version, result.length) != (request.version, request.length):
                text = f"target {request.source} has version {result.version} now; look again"
                raise EmberfsError(Code.STALE, text)
            remembered = state.remembered if state is not None else ()
            await run_thread_to_end(env, lambda: _put(replica, request, buffer, remembered))
        finally:
            buffers.give(buffer)
    log.warning(
        "target %d: chunk %s replaced by version %d of target %d",
        replica.target,
        request.chunk.hex(),
        request.version,
        request.source,
    )
    await replica.flush()


def _check(replica: TargetReplica, request: RepairRequest) -> None:
    view = replica.view
    if not view.serving or request.chain_version != view.chain_version:
        text = f"target {replica.target} is {view.public.name}, chain version {view.chain_version}"
        raise EmberfsError(Code.STALE, f"{text}; look again")
    if not 0 <= request.length <= CHUNK_BYTES_MAX or request.version < 1:
        raise EmberfsError(Code.INVALID, f"version {request.version}, {request.length} bytes")
    if request.source == replica.target:
        raise EmberfsError(Code.INVALID, "a replica cannot repair itself")


def _put(
    replica: TargetReplica,
    request: RepairRequest,
    buffer: Slice,
    remembered: tuple[RememberedWrite, ...],
) -> None:
    length = request.length
    replica.store.prepare_and_commit(
        request.chunk,
        UpdateKind.REPLACE,
        version=request.version,
        offset=0,
        length=length,
        data=buffer.view[:length],
        chunk_bytes=max(CHUNK_BYTES_MIN, 1 << (length - 1).bit_length() if length else 0),
        remembered=remembered,
    )
    replica.flusher.dirty = True
