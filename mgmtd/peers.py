"""Two mgmtd of one cluster on different stores would both lead: refuse that at the start.

A store gets an identity with its first primary. Whoever leads tells its own; a mgmtd whose store
has another one, or none, was given the wrong store.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from emberfs.proto import control_pb2 as pb
from emberfs.proto.cluster import ClusterId
from emberfs.proto.control_pb2_grpc import MgmtdStub
from emberfs.proto.control_wire import CODE_METADATA
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.mgmtd.peers")

ANSWER_TIMEOUT_S = 2.0
AGAIN_NS = 2 * SECOND

_OTHER_NAME = ClusterId("another cluster", 0)


async def led_by(address: str, cluster: str) -> ClusterId | None:
    """Return the cluster that a mgmtd leads; None if it does not answer or does not lead."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = pb.WatchRoutingRequest(cluster=cluster)
        stream = MgmtdStub(channel).WatchRouting(request, timeout=ANSWER_TIMEOUT_S)
        try:
            answer = await stream.read()
        except grpc.aio.AioRpcError as problem:
            codes = dict(problem.trailing_metadata() or ())
            wrong = codes.get(CODE_METADATA) == str(int(Code.WRONG_CLUSTER))
            return _OTHER_NAME if wrong else None
        finally:
            stream.cancel()
        if answer is grpc.aio.EOF:
            return None
        return ClusterId(answer.cluster, answer.identity)


class PeerCheck:
    """Asks every peer until it has answered once."""

    def __init__(
        self, env: Env, cluster: str, peers: tuple[str, ...], identity: Callable[[], Awaitable[int]]
    ) -> None:
        """`identity` reads that of the own store, 0 if it has none."""
        self._env = env
        self._cluster = cluster
        self._silent = set(peers)
        self._identity = identity

    async def once(self) -> None:
        """Ask who has not answered yet. EmberfsError(CONFIG): one of us has the wrong store."""
        peers = sorted(self._silent)
        answers = await asyncio.gather(*(led_by(peer, self._cluster) for peer in peers))
        for peer, found in zip(peers, answers, strict=True):
            if found is None:
                continue
            # Read after the answer: what leads has written its identity before.
            own = ClusterId(self._cluster, await self._identity())
            if found != own:
                theirs = f"{found.identity:x}" if found.identity else "of another name"
                mine = f"identity {own.identity:x}" if own.identity else "no cluster"
                raise EmberfsError(
                    Code.CONFIG,
                    f"mgmtd at {peer} leads on another store (its cluster is {theirs}, the store "
                    f'given here holds {mine}): all mgmtd of a cluster need the same "store"',
                )
            self._silent.discard(peer)

    async def live(self) -> None:
        """Go on asking. Returns when everyone has answered; raises as `once`."""
        while self._silent:
            await self._env.sleep_ns(AGAIN_NS)
            try:
                await self.once()
            except EmberfsError as problem:
                if problem.code == Code.CONFIG:
                    raise
                log.info("the own store cannot be read: %s", problem)
