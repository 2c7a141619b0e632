"""What every metadata handler works with."""

from collections.abc import Callable

import msgspec

from emberfs.kv.transactions import Engine
from emberfs.meta.announce import Announcer
from emberfs.meta.clients import Clients
from emberfs.meta.collect import Collector
from emberfs.meta.inline import Versions
from emberfs.meta.inode_ids import InodeIds
from emberfs.meta.quota_walk import QuotaWalks
from emberfs.meta.removed_trees import RemovedTrees
from emberfs.meta.replies import Replies
from emberfs.meta.schema import Owner
from emberfs.meta.tenure import Alone, Tenure
from emberfs.meta.trims import Chunks, Trims
from emberfs.proto.cluster import RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Layout
from emberfs.proto.ids import CHUNK_BYTES_DEFAULT, SECOND, ChainId, InodeId
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet


class Policy(msgspec.Struct, frozen=True):
    """How new files are laid out, and how long the trash keeps."""

    chunk_bytes: int = CHUNK_BYTES_DEFAULT
    stripe: int = 16  # chains of one file, at most
    trash_age_ns: int = 30 * 24 * 3600 * SECOND  # 0: for ever
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
        tenure: Tenure | None = None,
        chunks_of: Callable[[Owner], Chunks] | None = None,
        announcer: Announcer | None = None,
    ) -> None:
        """`is_fresh`: see Clients; `tenure`, `chunks_of`: if other servers use the store, too.

        `announcer`: of what `engine` commits.
        """
        self.env = env
        self.engine = engine
        self.routing = routing
        self.policy = policy
        self.ids = InodeIds(engine)
        self.tenure = tenure or Alone(env.random.getrandbits(63) | 1)
        self.versions = Versions(engine)
        self.promoting: set[InodeId] = set()  # files whose promotion may not be stable yet
        self.replies = Replies(env, engine, self.tenure)
        self.chunks = chunks
        self.clients = Clients(routing, is_fresh)
        self.trims = Trims(env, engine, self.tenure, chunks_of or (lambda owner: chunks))
        self.collector = Collector(env, engine, chunks, self.trims, self.tenure)
        self.announcer = announcer or Announcer(env)
        self.overdue: Callable[[], list[int]] = list  # clients; set by who sweeps sessions
        self.quota_walks = QuotaWalks(env, engine)
        self.removed_trees = RemovedTrees(env, engine, self.collector)
        self.tasks = TaskSet()  # which no call waits for, and which end with the server
        self._serving: tuple[RoutingSnapshot | None, tuple[ChainId, ...]] = (None, ())

    async def load(self) -> None:
        """Find what an earlier life of the server left to do. Before the first call."""
        await self.versions.load(takes_back=isinstance(self.tenure, Alone))
        await self.trims.load()

    def start(self) -> None:
        """Begin the work in the background."""
        self.trims.start()
        self.collector.start()
        self.quota_walks.start()
        self.removed_trees.start()
        self.tasks.spawn(self.replies.forgetting.live(), name="meta replies")

    async def close(self) -> None:
        """End the work in the background; what is unfinished stays recorded."""
        await self.tasks.close()
        await self.quota_walks.close()
        await self.removed_trees.close()
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
