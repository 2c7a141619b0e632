"""One client's connection to a cluster: routing, peers, and the services' clients on top."""

import logging
from collections.abc import Sequence

from emberfs.client.agent import Agent
from emberfs.client.chunkio import ChunkIO
from emberfs.client.control import Control
from emberfs.client.listening import Listening
from emberfs.client.metadata import Metadata
from emberfs.client.openfile import OpenFiles
from emberfs.client.routing import Routing
from emberfs.client.wiring import REAL, Wiring
from emberfs.fabric.pool import PeerPool
from emberfs.proto.cluster import Node, NodeKind
from emberfs.proto.ids import SECOND, ClientId, NodeId
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.client.cluster")


class Cluster:
    """Everything a client process needs, opened and closed together.

    Parts: env, control, routing, peers, chunkio, metadata, files, listening, client_id. Who caches
    starts `listening`.
    """

    def __init__(
        self,
        env: Env,
        control: Control,
        routing: Routing,
        client_id: ClientId,
        agent: Agent | None,
        *,
        durable_close: bool,
        wiring: Wiring = REAL,
    ) -> None:
        self.env = env
        self.control = control
        self.routing = routing
        self.client_id = client_id
        self.peers = PeerPool(env, wiring.transports)
        self.chunkio = ChunkIO(env, routing, self.peers, client_id)
        self.metadata = Metadata(
            env,
            routing,
            self.peers,
            client_id,
            since=lambda: 0 if agent is None else agent.needs_version,
        )
        self.files = OpenFiles(
            env,
            self.chunkio,
            self.metadata,
            durable_close=durable_close,
            membership=agent,
            routing=routing,
        )
        self.listening = Listening(env, routing, self.peers, client_id, agent)
        self._agent = agent

    @classmethod
    async def open(
        cls,
        env: Env,
        mgmtd: Sequence[str],
        cluster: str,
        *,
        register: bool = True,
        durable_close: bool = True,
        host: str = "",
        timeout_ns: int = 10 * SECOND,
        wiring: Wiring = REAL,
    ) -> "Cluster":
        """Connect. Raises UNREACHABLE, WRONG_CLUSTER or TIMEOUT with what to do about it.

        With `register` the process announces itself as a client and keeps a lease, so that its
        open-file sessions live as long as it does. Without `durable_close`, closing a written file
        makes it safe from dead processes, but only fsync makes it safe from a power cut. `mgmtd`
        are "ip:port" of the management service.
        """
        control = wiring.control(mgmtd, cluster)
        routing = Routing(env, control)
        agent: Agent | None = None
        try:
            await routing.start(timeout_ns)
            client_id = ClientId(env.random.getrandbits(63) | 1)
            if register:
                node = _client_node(env, client_id, host)
                agent = Agent(env, control, node, expect=routing.expect)
                await agent.start(timeout_ns)
        except BaseException:
            if agent is not None:
                await agent.close()
            await routing.close()
            await control.close()
            raise
        return cls(
            env, control, routing, client_id, agent, durable_close=durable_close, wiring=wiring
        )

    async def close(self) -> None:
        """Push what is buffered, end every session, say goodbye."""
        try:
            await self.files.close()
        finally:
            await self.listening.close()
            self.metadata.close()
            self.chunkio.close()
            await self.peers.close()
            if self._agent is not None:
                await self._agent.close()
            await self.routing.close()
            await self.control.close()


def _client_node(env: Env, client_id: ClientId, host: str) -> Node:
    return Node(
        id=NodeId(client_id & 0xFFFF_FFFF),
        kind=NodeKind.CLIENT,
        host=host or env.host_key,
        endpoints=(),
        incarnation=env.random.getrandbits(63) | 1,
        alive=True,
        client=client_id,
    )
