"""Calls from one storage target to another."""

from collections.abc import Callable

from emberfs.client.nodecalls import NodeCalls
from emberfs.fabric.call import Reply
from emberfs.fabric.region import Buffer, length_of
from emberfs.proto.cluster import RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import (
    CHUNK_ID_BYTES,
    SECOND,
    ChainVersion,
    ChunkId,
    NodeId,
    TargetId,
    target_node,
)
from emberfs.proto.method import Answer, Method, Request
from emberfs.proto.storage_calls import (
    LIST,
    READ_BATCH,
    SYNC,
    UPDATE,
    VERSION,
    ListAnswer,
    ListRequest,
    ReadOp,
    ReadResult,
    SyncAnswer,
    SyncRequest,
    UpdateAnswer,
    UpdateRequest,
    VersionRequest,
    pack_read_ops,
    unpack_read_results,
)
from emberfs.runtime.env import Env
from emberfs.storage.reach import Reach

FORWARD_TIMEOUT_NS = 5 * SECOND
SLOWEST_BYTES_PER_S = 8 << 20  # slower, and a chunk of 64 MiB cannot be forwarded
QUESTION_TIMEOUT_NS = 1 * SECOND
LIST_TIMEOUT_NS = 10 * SECOND
BUFFER_TIMEOUT_NS = 30 * SECOND  # for memory that other transfers hold, each for a few seconds
NO_CHUNK = ChunkId(bytes(CHUNK_ID_BYTES))

_NO_ANSWER = frozenset({Code.TIMEOUT, Code.DISCONNECTED, Code.UNREACHABLE})


class Links:
    """What replicas ask of each other. Every method raises what NodeCalls.call raises."""

    def __init__(self, env: Env, calls: NodeCalls) -> None:
        self._env = env
        self._calls = calls
        self.reach = Reach()

    async def update(self, request: UpdateRequest, source: Buffer | None) -> UpdateAnswer:
        """Forward an update, or the content of a chunk, to `request.target`."""
        sources = () if source is None else (source,)
        timeout_ns = FORWARD_TIMEOUT_NS + request.length * SECOND // SLOWEST_BYTES_PER_S
        return await self._ask(UPDATE, request, request.target, timeout_ns, sources)

    async def tail_version(
        self, tail: TargetId, chain_version: ChainVersion, chunk: ChunkId
    ) -> int:
        """Ask which version of a chunk the tail has committed."""
        request = VersionRequest(tail, chain_version, chunk)
        return (await self._ask(VERSION, request, tail, QUESTION_TIMEOUT_NS)).version

    async def read_chunk(
        self, target: TargetId, chain_version: ChainVersion, chunk: ChunkId, sink: Buffer
    ) -> ReadResult:
        """Read a chunk from its start. Raises the operation's own code."""
        operation = ReadOp(target, chain_version, chunk, 0, length_of(sink))
        reply = await self._call(
            target_node(target),
            READ_BATCH,
            pack_read_ops([operation]),
            FORWARD_TIMEOUT_NS,
            sinks=(sink,),
        )
        results = unpack_read_results(reply.body)
        if len(results) != 1:
            raise EmberfsError(Code.MALFORMED, f"{len(results)} results for one read")
        if results[0].code:
            raise EmberfsError(Code(results[0].code), f"target {target} cannot read the chunk")
        return results[0]

    async def list(self, request: ListRequest) -> ListAnswer:
        """Fetch a page of another target's inventory."""
        return await self._ask(LIST, request, request.target, LIST_TIMEOUT_NS)

    async def sync(self, request: SyncRequest) -> SyncAnswer:
        """Tell a target how its recovery goes."""
        return await self._ask(SYNC, request, request.target, FORWARD_TIMEOUT_NS)

    async def _ask(
        self,
        method: Method[Request, Answer],
        request: Request,
        target: TargetId,
        timeout_ns: int,
        sources: tuple[Buffer, ...] = (),
    ) -> Answer:
        def still_member(snapshot: RoutingSnapshot) -> bool:
            status = snapshot.targets.get(target)
            return status is None or status.node == target_node(target)

        reply = await self._call(
            target_node(target),
            method.number,
            method.encode_request(request),
            timeout_ns,
            sources=sources,
            still_good=still_member,
        )
        return method.decode_answer(reply.body)

    async def ping(self, target: TargetId) -> None:
        """Find out whether the node of a target answers; any answer is as good as another."""
        request = VersionRequest(target, ChainVersion(0), NO_CHUNK)
        try:
            await self._ask(VERSION, request, target, QUESTION_TIMEOUT_NS)
        except EmberfsError:
            pass  # noted in `reach`

    async def _call(
        self,
        node: NodeId,
        method: int,
        body: bytes,
        timeout_ns: int,
        *,
        sources: tuple[Buffer, ...] = (),
        sinks: tuple[Buffer, ...] = (),
        still_good: Callable[[RoutingSnapshot], bool] | None = None,
    ) -> Reply:
        """Call a node and note whether it answers."""
        ticket = self.reach.sent(node, self._env.now_ns())
        try:
            reply = await self._calls.call(
                node,
                method,
                body,
                sources=sources,
                sinks=sinks,
                timeout_ns=timeout_ns,
                still_good=still_good,
            )
        except EmberfsError as problem:
            if problem.code in _NO_ANSWER:
                self.reach.lost(ticket)
            else:
                self.reach.answered(ticket, self._env.now_ns())
            raise
        except BaseException:
            self.reach.given_up(ticket)
            raise
        self.reach.answered(ticket, self._env.now_ns())
        return reply
