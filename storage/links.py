"""Calls from one storage target to another."""

from emberfs.client.nodecalls import NodeCalls
from emberfs.fabric.region import Buffer, length_of
from emberfs.proto.cluster import RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND, ChainVersion, ChunkId, TargetId, target_node
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

FORWARD_TIMEOUT_NS = 5 * SECOND
SLOWEST_BYTES_PER_S = 8 << 20  # slower, and a chunk of 64 MiB cannot be forwarded
QUESTION_TIMEOUT_NS = 1 * SECOND
LIST_TIMEOUT_NS = 10 * SECOND
BUFFER_TIMEOUT_NS = 30 * SECOND  # for memory that other transfers hold, each for a few seconds


class Links:
    """What replicas ask of each other. Every method raises what NodeCalls.call raises."""

    def __init__(self, calls: NodeCalls) -> None:
        self._calls = calls

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
        reply = await self._calls.call(
            target_node(target),
            READ_BATCH,
            pack_read_ops([operation]),
            sinks=(sink,),
            timeout_ns=FORWARD_TIMEOUT_NS,
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

        reply = await self._calls.call(
            target_node(target),
            method.number,
            method.encode_request(request),
            sources=sources,
            timeout_ns=timeout_ns,
            still_good=still_member,
        )
        return method.decode_answer(reply.body)
