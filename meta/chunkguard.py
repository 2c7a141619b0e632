"""Chunk calls of one tenure: none is sent when the tenure is over, see tenure.py.

The check stands between the connection and the call, where nothing waits: what passes it has been
sent. A tenure has its own client id, so what its calls leave behind concerns no later one.
"""

from collections.abc import Callable, Sequence

from emberfs.client.chunkio import ChunkIO
from emberfs.client.nodecalls import Peers, RoutingView
from emberfs.fabric.call import Peer
from emberfs.meta.schema import Owner
from emberfs.meta.tenure import Tenure
from emberfs.meta.trims import Chunks
from emberfs.proto.errors import Code, EmberfsError
from emberfs.runtime.env import Env


class _GuardedPeers:
    def __init__(self, peers: Peers, holds: Callable[[], bool]) -> None:
        self._peers = peers
        self._holds = holds

    def ready(self, endpoints: tuple[str, ...]) -> Peer | None:
        """See Peers."""
        return self._peers.ready(endpoints) if self._holds() else None

    async def get(self, endpoints: Sequence[str]) -> Peer:
        """See Peers. CANCELLED when the tenure is over: nobody tries again."""
        peer = await self._peers.get(endpoints)
        if not self._holds():
            raise EmberfsError(Code.CANCELLED, "another metadata server may have taken over")
        return peer


class ChunkGuard:
    """The chunk calls of the present tenure."""

    def __init__(self, env: Env, routing: RoutingView, peers: Peers, tenure: Tenure) -> None:
        self._env = env
        self._routing = routing
        self._peers = peers
        self._tenure = tenure
        self._present: tuple[Owner, ChunkIO] | None = None

    def of(self, owner: Owner) -> Chunks:
        """Return calls that are made while `owner` is this server and its lease is good."""
        if self._present is not None and self._present[0] == owner:
            return self._present[1]
        self.close()
        peers = _GuardedPeers(self._peers, lambda: self._tenure.holds(owner))
        client_id = self._env.random.getrandbits(63) | 1
        chunkio = ChunkIO(self._env, self._routing, peers, client_id)
        self._present = (owner, chunkio)
        return chunkio

    def close(self) -> None:
        """Stop listening to routing."""
        if self._present is not None:
            self._present[1].close()
