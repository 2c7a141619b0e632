"""The data-plane methods of a storage process, for all its targets."""

import logging
from collections.abc import Callable, Mapping

from emberfs.client.nodecalls import NodeCalls, Peers, RoutingView
from emberfs.fabric.buffers import BufferPool
from emberfs.fabric.call import Handler, ServerCall
from emberfs.fabric.region import Slice
from emberfs.proto.cluster import Chain, PublicState, RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import (
    CHUNK_BYTES_MAX,
    CHUNK_ID_BYTES,
    ChainId,
    ChunkId,
    MiB,
    TargetId,
)
from emberfs.proto.storage_calls import (
    FLUSH,
    FSCK,
    LIST,
    READ_BATCH,
    SYNC,
    UPDATE,
    VERSION,
    FlushAnswer,
    FsckAnswer,
    ListAnswer,
    SyncAnswer,
    UpdateAnswer,
    UpdateKind,
    UpdateRequest,
    VersionAnswer,
)
from emberfs.runtime.checksum import crc32c
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet
from emberfs.storage.filling import Throttle
from emberfs.storage.forward import ReplaceOrder
from emberfs.storage.hosted import HostedTarget
from emberfs.storage.lasting import run_thread_to_end
from emberfs.storage.links import Links
from emberfs.storage.metrics import (
    UPDATE_SECONDS,
    UPDATES_FAILED,
    UPDATES_OK,
    WRITTEN_BYTES,
)
from emberfs.storage.reads import Reader
from emberfs.storage.repair import Repairer
from emberfs.storage.replica import TargetReplica
from emberfs.storage.target import SyncCompleted

log = logging.getLogger("emberfs.storage.service")

CHECKSUM_INLINE_BYTES_MAX = 2 * MiB  # about 100 us
LIST_LIMIT_MAX = 4096
OWN_BUFFERS_BYTES = 256 * MiB  # for whole chunks sent in recovery and repair


class StorageService:
    """All targets of one process behind one set of handlers."""

    def __init__(
        self,
        env: Env,
        routing: RoutingView,
        peers: Peers,
        targets: Mapping[TargetId, HostedTarget],
        *,
        lease_ok: Callable[[], bool],
        report_now: Callable[[], None],
        sync_bytes_per_s: int = 0,
    ) -> None:
        self._env = env
        self._routing = routing
        self.targets = targets
        self._lease_ok = lease_ok
        self._report_now = report_now
        self._throttle = Throttle(env, sync_bytes_per_s)
        self._calls = NodeCalls(env, routing, peers)
        self._links = Links(self._calls)
        self._buffers = BufferPool(OWN_BUFFERS_BYTES)
        self._tasks = TaskSet()
        self._replicas: dict[TargetId, TargetReplica] = {}
        self._order = ReplaceOrder()
        self._repairer = Repairer(env, self._links, self._buffers, self._chain, self._tasks)
        self._reader = Reader(env, self._replicas, self._links, lease_ok, self._repairer.damaged)
        self._stopping = False

    def _chain(self, chain: ChainId) -> Chain | None:
        return self._routing.snapshot.chains.get(chain)

    @property
    def handlers(self) -> dict[int, Handler]:
        """Handlers by method number."""
        return {
            READ_BATCH: self._reader.read_batch,
            UPDATE.number: self.update,
            VERSION.number: self.version,
            FLUSH.number: self.flush,
            LIST.number: self.list_chunks,
            SYNC.number: self.sync,
            FSCK.number: self.fsck,
        }

    async def open(self) -> None:
        """Open all targets side by side; those that cannot be opened are reported OFFLINE."""
        self.apply(self._routing.snapshot)
        self._routing.subscribe(self.apply)
        sharers = len(self.targets)
        opening = [
            self._tasks.spawn(
                hosted.open(
                    self._links,
                    self._buffers,
                    self._repairer,
                    self._report_now,
                    throttle=self._throttle,
                    sharers=sharers,
                ),
                name=f"opening target {hosted.target}",
            )
            for hosted in self.targets.values()
        ]
        for task in opening:
            await task
        for target, hosted in self.targets.items():
            if hosted.replica is not None:
                self._replicas[target] = hosted.replica
        self.apply(self._routing.snapshot)

    def apply(self, snapshot: RoutingSnapshot) -> None:
        """Take over routing, unless we stop."""
        if not self._stopping:
            for hosted in self.targets.values():
                hosted.apply(snapshot)

    async def close_replicas(self) -> None:
        """End all operations; what is not committed stays pending."""
        self._stopping = True
        for replica in self._replicas.values():
            await replica.close()

    async def close(self) -> None:
        """Stop the replicas, then close the stores."""
        self._stopping = True
        self._calls.close()
        await self._tasks.close()
        for hosted in self.targets.values():
            await hosted.close()
        self._replicas.clear()
        self._buffers.close()

    def _replica(self, target: TargetId) -> TargetReplica:
        replica = self._replicas.get(target)
        if replica is None:
            hosted = self.targets.get(target)
            why = hosted.state.reason if hosted is not None else "it is not on this node"
            raise EmberfsError(Code.NOT_SERVING, f"target {target} is not open: {why}")
        return replica

    # -------------------------------------------------------- handlers

    async def update(self, call: ServerCall) -> bytes:
        """The handler of UPDATE: from clients and from predecessors."""
        started_ns = self._env.now_ns()
        try:
            request = UPDATE.decode_request(call.body)
            source = call.sources[0] if call.sources else None
            replica = self._replica(request.target)
            check_update(request, source)
            await self._verify(request, source)
            await replica.catch_up(request.chain_version)
            if request.version == 0 and not self._lease_ok():
                text = "this node has not reached mgmtd for too long"
                raise EmberfsError(Code.NOT_SERVING, text)
            if request.kind == UpdateKind.REPLACE and not self._order.admit(request):
                raise EmberfsError(Code.SUPERSEDED, "a later replacement has come before")
            version, length = await replica.update(request, source)
        except BaseException:
            UPDATES_FAILED.inc()
            raise
        UPDATES_OK.inc()
        WRITTEN_BYTES.inc(source.length if source is not None else 0)
        UPDATE_SECONDS.observe((self._env.now_ns() - started_ns) / 1e9)
        return UPDATE.encode_answer(UpdateAnswer(version, length, replica.view.chain_version))

    async def _verify(self, request: UpdateRequest, source: Slice | None) -> None:
        if source is None or not source.length:
            return
        view = source.view
        if len(view) <= CHECKSUM_INLINE_BYTES_MAX:
            found = crc32c(view)
        else:
            found = await run_thread_to_end(self._env, lambda: crc32c(view))
        if found != request.checksum:
            text = "the payload was changed on its way; send it again"
            raise EmberfsError(Code.CHECKSUM, text)

    async def version(self, call: ServerCall) -> bytes:
        """The handler of VERSION."""
        request = VERSION.decode_request(call.body)
        chunk = checked_chunk(request.chunk)
        version = await self._reader.version(request.target, request.chain_version, chunk)
        return VERSION.encode_answer(VersionAnswer(version))

    async def flush(self, call: ServerCall) -> bytes:
        """The handler of FLUSH."""
        request = FLUSH.decode_request(call.body)
        for target in request.targets:
            replica = self._replica(target)
            if not replica.view.writable:
                text = f"target {target} is {replica.view.public.name}: it holds no promise"
                raise EmberfsError(Code.NOT_SERVING, text)
        for target in request.targets[1:]:  # side by side, without a task for the usual one
            self._tasks.spawn(self._flush_quietly(target), name="flush")
        for target in request.targets:
            await self._replica(target).flush()
        return FLUSH.encode_answer(FlushAnswer(request.targets))

    async def _flush_quietly(self, target: TargetId) -> None:
        try:
            await self._replica(target).flush()
        except EmberfsError:
            pass  # the handler meets it too

    async def list_chunks(self, call: ServerCall) -> bytes:
        """The handler of LIST."""
        request = LIST.decode_request(call.body)
        replica = self._replica(request.target)
        if request.serving_only and not (replica.state.serves and self._lease_ok()):
            raise EmberfsError(Code.NOT_SERVING, f"target {request.target} does not serve")
        limit = min(max(request.limit, 1), LIST_LIMIT_MAX)
        rows, more = await self._env.run_blocking(
            lambda: replica.store.list(request.start, request.stop, limit, request.verify)
        )
        if replica.state.serves:
            for row in rows:
                if row.damaged:
                    self._repairer.damaged(replica, row.chunk)
        return LIST.encode_answer(ListAnswer(tuple(rows), more))

    async def sync(self, call: ServerCall) -> bytes:
        """The handler of SYNC: how our own recovery goes."""
        request = SYNC.decode_request(call.body)
        replica = self._replica(request.target)
        await replica.catch_up(request.chain_version)
        view, hosted = replica.view, self.targets[request.target]
        if request.chain_version != view.chain_version:
            text = f"the chain is at version {view.chain_version} here"
            raise EmberfsError(Code.CHAIN_VERSION, text)
        if view.public != PublicState.SYNCING:
            text = f"target {request.target} is {view.public.name}, not SYNCING"
            raise EmberfsError(Code.NOT_SERVING, text)
        hosted.sync_progress = (request.done_bytes, request.total_bytes)
        if request.done:
            # What was received may be acknowledged to nobody as stable before it is.
            await replica.flush()
            replica.settle(SyncCompleted(request.chain_version))
            self._report_now()
        return SYNC.encode_answer(SyncAnswer(accepted=True))

    async def fsck(self, call: ServerCall) -> bytes:
        """The handler of FSCK."""
        request = FSCK.decode_request(call.body)
        found = await self._env.run_blocking(self._replica(request.target).store.check)
        return FSCK.encode_answer(FsckAnswer(found.chunks, found.blocks, tuple(found.findings)))


def checked_chunk(chunk: bytes) -> ChunkId:
    """Return a chunk id from outside. MALFORMED if it is none."""
    if len(chunk) != CHUNK_ID_BYTES:
        raise EmberfsError(Code.MALFORMED, f"a chunk id of {len(chunk)} bytes")
    return ChunkId(bytes(chunk))


def check_update(request: UpdateRequest, source: Slice | None) -> None:
    """Refuse an update that no chunk store could take. INVALID or MALFORMED."""
    checked_chunk(request.chunk)
    carried = source.length if source is not None else 0
    wanted = request.length if request.kind in (UpdateKind.WRITE, UpdateKind.REPLACE) else 0
    if carried != wanted:
        raise EmberfsError(Code.INVALID, f"a payload of {carried} bytes, {wanted} announced")
    if not 0 < request.chunk_bytes <= CHUNK_BYTES_MAX:
        raise EmberfsError(Code.INVALID, f"chunk size {request.chunk_bytes} is out of range")
    if request.offset < 0 or request.length < 0 or request.version < 0:
        raise EmberfsError(Code.INVALID, "a negative offset, length or version")
    if request.offset + request.length > request.chunk_bytes:
        text = f"{request.offset}+{request.length} ends behind a chunk of {request.chunk_bytes}"
        raise EmberfsError(Code.INVALID, text)
    if request.kind == UpdateKind.REPLACE and request.version == 0:
        raise EmberfsError(Code.INVALID, "replacements come from replicas only")
    if request.kind == UpdateKind.WRITE and request.length == 0:
        raise EmberfsError(Code.INVALID, "a write of no bytes")
