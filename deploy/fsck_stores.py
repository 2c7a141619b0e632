"""The storage services as fsck sees them: inventories, block checks, and the repairs of chunks."""

from emberfs.client.chunkwrite import ChunkWriter, Update
from emberfs.client.cluster import Cluster
from emberfs.client.nodecalls import NodeCalls
from emberfs.deploy.fsck_chunks import FreeBlocks, ReplaceReplica
from emberfs.proto.cluster import Chain, ChainTarget
from emberfs.proto.ids import CHUNK_BYTES_MAX, SECOND, ChainId, ChunkId
from emberfs.proto.method import Answer, Method, Request
from emberfs.proto.storage_calls import (
    FSCK,
    LIST,
    REPAIR,
    FsckAnswer,
    FsckRequest,
    ListAnswer,
    ListRequest,
    RepairRequest,
    UpdateKind,
)

CALL_TIMEOUT_NS = 60 * SECOND


class ClusterStores:
    """Calls to the targets of one cluster. Every method raises what NodeCalls.call raises."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        env = cluster.env
        self._nodes = NodeCalls(env, cluster.routing, cluster.peers)
        # Its own client id: tags of two writers under one id would be taken for each other.
        own = env.random.getrandbits(63) | 1
        self._writer = ChunkWriter(env, cluster.routing, self._nodes, own)

    def close(self) -> None:
        """Stop listening to routing."""
        self._nodes.close()

    def chains(self) -> list[Chain]:
        """All chains as routing shows them now, by id."""
        return sorted(self._cluster.routing.snapshot.chains.values(), key=lambda c: c.id)

    async def list(
        self, member: ChainTarget, start: bytes, stop: bytes, limit: int, *, verify: bool
    ) -> ListAnswer:
        """A page of a replica's inventory; looking at damage does not repair it."""
        request = ListRequest(
            target=member.target,
            start=start,
            stop=stop,
            limit=limit,
            verify=verify,
            serving_only=True,
            heal=False,
        )
        return await self._call(member, LIST, request)

    async def check(self, member: ChainTarget) -> FsckAnswer:
        """Compare a replica's allocation bitmaps with its records."""
        return await self._call(member, FSCK, FsckRequest(target=member.target))

    async def replace(self, order: ReplaceReplica) -> None:
        """Make a replica equal to another. STALE or BUSY if the chunk moves meanwhile."""
        request = RepairRequest(
            target=order.target.target,
            chain_version=order.chain_version,
            chunk=order.chunk,
            source=order.source,
            version=order.wanted.version,
            length=order.wanted.length,
        )
        await self._call(order.target, REPAIR, request)

    async def free(self, order: FreeBlocks) -> None:
        """Free blocks that nothing owns. STALE if there are more or fewer of them by now."""
        request = FsckRequest(target=order.target.target, free=order.leak)
        await self._call(order.target, FSCK, request)

    async def remove(self, chain: ChainId, chunk: ChunkId) -> None:
        """Remove one chunk from all replicas of a chain, as a client would."""
        update = Update(chain, chunk, UpdateKind.REMOVE, 0, 0, CHUNK_BYTES_MAX)
        await self._writer.update(update, CALL_TIMEOUT_NS)

    async def _call(
        self, member: ChainTarget, method: Method[Request, Answer], request: Request
    ) -> Answer:
        body = method.encode_request(request)
        reply = await self._nodes.call(member.node, method.number, body, timeout_ns=CALL_TIMEOUT_NS)
        return method.decode_answer(reply.body)
