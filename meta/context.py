"""What every metadata handler works with."""

from collections.abc import Callable

import msgspec

from emberfs.kv.transaction import Engine
from emberfs.meta.clients import Clients
from emberfs.meta.collect import Collector
from emberfs.meta.inline import Versions
from emberfs.meta.inode_ids import InodeIds
from emberfs.meta.replies import Replies
from emberfs.meta.trims import Chunks, Trims
from emberfs.proto.cluster import RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Layout
from emberfs.proto.ids import CHUNK_BYTES_DEFAULT, ChainId, InodeId
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet


class Policy(msgspec.Struct, frozen=True):
    """How new files are laid out."""

    chunk_bytes: int = CHUNK_BYTES_DEFAULT
    stripe: int = 16  # chains of one file, at most
    inline_bytes_max: int = 0  # files up to this size have no chunks; 0: all have


class Context:
    """The parts of one metadata server that its handlers share."""

    def __init__(
        self,
        env: Env,
        engine: Engine,
        chunks: Chunks,
        routing: Callable[[], RoutingSnapshot],
        policy: Policy,
        is_fresh: Callable[[], bool] = lambda: True,
    ) -> None:
        """`is_fresh`: see Clients."""
        self.env = env
        self.engine = engine
        self.routing = routing
        self.policy = policy
        self.ids = InodeIds(engine)
        self.versions = Versions(engine)
        self.promoting: set[InodeId] = set()  # files whose promotion may not be stable yet
        self.replies = Replies(env, engine)
        self.chunks = chunks
        self.clients = Clients(routing, is_fresh)
        self.trims = Trims(env, engine, chunks)
        self.collector = Collector(env, engine, chunks, self.trims)
        self.overdue: Callable[[], list[int]] = list  # clients; set by who sweeps sessions
        self._tasks = TaskSet()
        self._serving: tuple[RoutingSnapshot | None, tuple[ChainId, ...]] = (None, ())

    async def load(self) -> None:
        """Find what an earlier life of the server left to do. Before the first call."""
        await self.versions.load()
        await self.replies.load()
        await self.trims.load()

    def start(self) -> None:
        """Begin the work in the background."""
        self.trims.start()
        self.collector.start()
        self._tasks.spawn(self.replies.live(), name="meta replies")

    async def close(self) -> None:
        """End the work in the background; what is unfinished stays recorded."""
        await self._tasks.close()
        await self.collector.close()
        await self.trims.close()

    def new_layout(self, inode: InodeId) -> Layout:
        """Where a new file's chunks go: the chains that serve now, begun at another one per file.

        Raises NOT_SERVING when there is none.
        """
        chains = self._serving_chains()
        first = inode % len(chains)
        rotated = chains[first:] + chains[:first]
        return Layout(self.policy.chunk_bytes, rotated[: self.policy.stripe])

    def _serving_chains(self) -> tuple[ChainId, ...]:
        snapshot = self.routing()
        if self._serving[0] is not snapshot:
            chains = sorted(c.id for c in snapshot.chains.values() if c.head() is not None)
            self._serving = (snapshot, tuple(chains))
        if not self._serving[1]:
            raise EmberfsError(
                Code.NOT_SERVING,
                f"no chain is serving: {len(snapshot.chains)} chains known in routing version "
                f"{snapshot.version}; start the storage services",
            )
        return self._serving[1]
