"""The data-plane methods of a storage process, for all its targets."""

import logging
from collections.abc import Callable, Mapping

import msgspec

from emberfs.client.nodecalls import NodeCalls, Peers, RoutingView
from emberfs.fabric.buffers import BufferPool
from emberfs.fabric.call import Handler, QuickHandler, ServerCall
from emberfs.fabric.region import Slice
from emberfs.proto.cluster import Chain, PublicState, RoutingSnapshot, TargetReport
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
    REPAIR,
    SYNC,
    UPDATE,
    VERSION,
    ChunkRow,
    FlushAnswer,
    FsckAnswer,
    ListAnswer,
    RepairAnswer,
    SyncAnswer,
    UpdateKind,
    UpdateRequest,
    VersionAnswer,
)
from emberfs.runtime.checksum import crc32c
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet
from emberfs.storage.filling import Throttle
from emberfs.storage.hoporder import HopOrder
from emberfs.storage.hosted import HostedTarget
from emberfs.storage.lasting import run_thread_to_end
from emberfs.storage.links import Links
from emberfs.storage.metrics import (
    UPDATE_SECONDS,
    UPDATES_FAILED,
    UPDATES_OK,
    WRITTEN_BYTES,
)
from emberfs.storage.reachwatch import ReachWatch
from emberfs.storage.reads import Reader
from emberfs.storage.repair import Repairer
from emberfs.storage.replace import replace_replica
from emberfs.storage.replica import TargetReplica
from emberfs.storage.scrub import ScrubSettings
from emberfs.storage.target import SyncCompleted, SyncHeard
from emberfs.storage.view import View

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
        scrub: ScrubSettings | None = None,
        services_on_disk: int = 1,
    ) -> None:
        self._env = env
        self._routing = routing
        self.targets = targets
        self._lease_ok = lease_ok
        self._report_now = report_now
        self._scrub = scrub or ScrubSettings()
        self._services_on_disk = services_on_disk
        self._throttle = Throttle(env, sync_bytes_per_s)
        self._calls = NodeCalls(env, routing, peers)
        self._links = Links(env, self._calls)
        self._buffers = BufferPool(OWN_BUFFERS_BYTES)
        self._tasks = TaskSet()
        self._replicas: dict[TargetId, TargetReplica] = {}
        self._order = HopOrder()
        self._repairer = Repairer(env, self._links, self._buffers, self._chain, self._tasks)
        self._reader = Reader(env, self._replicas, self._links, lease_ok, self._repairer.damaged)
        self._reach = ReachWatch(env, routing, self._links, targets, report_now)
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
            REPAIR.number: self.repair,
        }

    @property
    def quick(self) -> dict[int, QuickHandler]:
        """Those that may answer without waiting."""
        return {READ_BATCH: self._reader.read_now}

    async def open(self) -> None:
        """Open all targets side by side; those that cannot be opened are reported OFFLINE."""
        self.apply(self._routing.snapshot)
        self._routing.subscribe(self.apply)
        sharers = len(self.targets) * self._services_on_disk
        opening = [
            self._tasks.spawn(
                hosted.open(
                    self._links,
                    self._buffers,
                    self._repairer,
                    self._report_now,
                    throttle=self._throttle,
                    scrub=self._scrub,
                    lease_ok=self._lease_ok,
                    sharers=sharers,
                ),
                name=f"opening target {hosted.target}",
            )
            for hosted in self.targets.values()
        ]
        for task in opening:
            await task
        self._note_replicas()
        self.apply(self._routing.snapshot)
        self._tasks.spawn(self._reach.run(self._tasks), name="watching who answers")
        for hosted in self.targets.values():
            self._tasks.spawn(
                hosted.keep_open(self._note_replicas), name=f"keeping target {hosted.target} open"
            )

    def _note_replicas(self) -> None:
        """Know which targets are open."""
        for target, hosted in self.targets.items():
            if hosted.replica is not None:
                self._replicas[target] = hosted.replica
            else:
                self._replicas.pop(target, None)

    def reports(self) -> list[TargetReport]:
        """What the next heartbeat says of every target."""
        return [
            msgspec.structs.replace(
                hosted.report(), unreachable=self._reach.unreachable.get(target, ())
            )
            for target, hosted in self.targets.items()
        ]

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
            if request.version == 0:
                self._fenced()
            if request.version and not self._order.admit(request):
                raise EmberfsError(Code.SUPERSEDED, "a later message has come before")
            answer = await replica.update(request, source)
            if request.version == 0:
                # Committed or not by the chain as it is now: the retry will be told.
                self._fenced()
        except BaseException:
            UPDATES_FAILED.inc()
            raise
        UPDATES_OK.inc()
        WRITTEN_BYTES.inc(source.length if source is not None else 0)
        UPDATE_SECONDS.observe((self._env.now_ns() - started_ns) / 1e9)
        return UPDATE.encode_answer(answer)

    def _fenced(self) -> None:
        """Raise NOT_SERVING when somebody else may be in our place already."""
        if not self._lease_ok():
            raise EmberfsError(Code.NOT_SERVING, "this node has not reached mgmtd for too long")

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
        views = [self._promising(target) for target in request.targets]
        for target in request.targets[1:]:  # side by side, without a task for the usual one
            self._tasks.spawn(self._flush_quietly(target), name="flush")
        for target in request.targets:
            await self._replica(target).flush()
        if [self._promising(target) for target in request.targets] != views:
            raise EmberfsError(Code.CHAIN_VERSION, "the chain has changed during the flush")
        lost = tuple(view.lost for view in views)
        return FLUSH.encode_answer(FlushAnswer(request.targets, lost))

    def _promising(self, target: TargetId) -> View:
        """Return the place of a target whose stable storage counts. NOT_SERVING if it does not."""
        self._fenced()
        replica = self._replica(target)
        if not replica.view.writable:
            text = f"target {target} is {replica.view.public.name}: it holds no promise"
            raise EmberfsError(Code.NOT_SERVING, text)
        return replica.view

    async def _flush_quietly(self, target: TargetId) -> None:
        try:
            await self._replica(target).flush()
        except EmberfsError:
            pass  # the handler meets it too

    async def list_chunks(self, call: ServerCall) -> bytes:
        """The handler of LIST."""
        request = LIST.decode_request(call.body)
        replica = self._replica(request.target)
        if request.serving_only:
            self._must_serve(replica)
        view = replica.view
        limit = min(max(request.limit, 1), LIST_LIMIT_MAX)
        rows, more = await self._env.run_blocking(
            lambda: replica.store.list(
                request.start, request.stop, limit, request.verify, request.with_tombstones
            )
        )
        if request.serving_only:
            self._must_serve(replica)
            if replica.view != view:
                raise EmberfsError(Code.CHAIN_VERSION, "the chain has changed meanwhile")
        if request.heal and replica.state.serves:
            for row in rows:
                if row.damaged:
                    self._repairer.damaged(replica, row.chunk)
        if request.with_writers:
            rows = [_with_writers(replica, row) for row in rows]
        return LIST.encode_answer(ListAnswer(tuple(rows), more))

    def _must_serve(self, replica: TargetReplica) -> None:
        self._fenced()
        if not replica.state.serves:
            raise EmberfsError(Code.NOT_SERVING, f"target {replica.target} does not serve")

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
        if request.done or replica.state.completed_version != request.chain_version:
            hosted.sync = request
        replica.settle(SyncHeard(request.chain_version, request.problem))
        if request.done:
            # A write that a slow disk began while we still served may have become pending only
            # after our inventory was read: it must not serve, the next comparison replaces it.
            await replica.settled()
            if replica.has_leftovers:
                text = f"target {request.target} has an older pending write; compare again"
                raise EmberfsError(Code.BUSY, text)
            # What was received may be acknowledged to nobody as stable before it is.
            await replica.flush()
            replica.settle(SyncCompleted(request.chain_version))
            self._report_now()
        return SYNC.encode_answer(SyncAnswer(accepted=True))

    async def fsck(self, call: ServerCall) -> bytes:
        """The handler of FSCK."""
        request = FSCK.decode_request(call.body)
        store, leak = self._replica(request.target).store, request.free
        if leak is not None:
            await run_thread_to_end(self._env, lambda: store.free_leaked(leak))
            log.warning("target %d: freed: %s", request.target, leak.in_words())
        found = await self._env.run_blocking(store.check)
        answer = FsckAnswer(found.chunks, found.blocks, tuple(found.findings), tuple(found.leaks))
        return FSCK.encode_answer(answer)

    async def repair(self, call: ServerCall) -> bytes:
        """The handler of REPAIR."""
        request = REPAIR.decode_request(call.body)
        checked_chunk(request.chunk)
        replica = self._replica(request.target)
        await replace_replica(self._env, replica, self._links, self._buffers, request)
        return REPAIR.encode_answer(RepairAnswer(request.version))


def checked_chunk(chunk: bytes) -> ChunkId:
    """Return a chunk id from outside. MALFORMED if it is none."""
    if len(chunk) != CHUNK_ID_BYTES:
        raise EmberfsError(Code.MALFORMED, f"a chunk id of {len(chunk)} bytes")
    return ChunkId(bytes(chunk))


def _with_writers(replica: TargetReplica, row: ChunkRow) -> ChunkRow:
    state = replica.store.state(ChunkId(row.chunk))
    if state is None or state.version != row.version:
        return row
    return msgspec.structs.replace(row, remembered=state.remembered)


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
