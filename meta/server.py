"""emberfs-meta: the metadata service as a process."""

import logging
import os
from collections.abc import Callable

import msgspec

from emberfs.client.agent import Agent
from emberfs.client.cluster import Cluster
from emberfs.client.wiring import REAL, Wiring
from emberfs.fabric.server import Server
from emberfs.kv.rocks import RocksStore
from emberfs.kv.store import OrderedStore
from emberfs.kv.transaction import Engine as LocalEngine
from emberfs.kv.transactions import Engine
from emberfs.kv.url import open_engine, parse_store
from emberfs.meta import tree_calls
from emberfs.meta.announce import Announced, Announcer
from emberfs.meta.chunkguard import ChunkGuard
from emberfs.meta.context import Context, Policy
from emberfs.meta.dispatch import handlers
from emberfs.meta.format import open_file_system
from emberfs.meta.metrics import CONFLICTS
from emberfs.meta.orphans import Orphans
from emberfs.meta.sessions import SessionSweeper
from emberfs.meta.tenure import Alone, Shared, Tenure
from emberfs.proto.cluster import Node, NodeKind
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import INLINE_BYTES_MAX
from emberfs.proto.ids import (
    CHUNK_BYTES_DEFAULT,
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    SECOND,
    KiB,
    NodeId,
)
from emberfs.runtime.env import Env
from emberfs.runtime.service import run_service
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.meta.server")

DRAIN_NS = 2 * SECOND
STRIPE_MAX = 1024
TRASH_DAYS_MAX = 36_500
DAY_NS = 24 * 3600 * SECOND
INLINE_BYTES_DEFAULT = 8 * KiB


class MetaConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The TOML file of emberfs-meta."""

    cluster: str
    node: int
    mgmtd: tuple[str, ...]  # "ip:port" of the management service
    listen: tuple[str, ...]  # "tcp://127.0.0.1:9201", "shm:///path/to.sock"
    data: str = ""  # directory
    store: str = ""  # where the metadata lies, see kv/url.py; empty: in `data`
    host: str = ""  # name shown in status
    metrics_port: int = 0
    log_level: str = "INFO"
    chunk_bytes: int = CHUNK_BYTES_DEFAULT
    stripe: int = 16  # chains that one file is spread over, at most
    inline_bytes_max: int = INLINE_BYTES_DEFAULT  # smaller files have no chunks; 0: all have
    session_grace_s: float = 30.0
    trash_days: float = 30.0  # after which what is in the trash is removed; 0: never
    start_timeout_s: float = 10.0


def check_config(config: MetaConfig) -> None:
    """Refuse settings that cannot work. Raises EmberfsError(CONFIG)."""
    size = config.chunk_bytes
    if not CHUNK_BYTES_MIN <= size <= CHUNK_BYTES_MAX or size & (size - 1):
        raise EmberfsError(
            Code.CONFIG,
            f"chunk_bytes = {size}: write a power of two from {CHUNK_BYTES_MIN} to "
            f"{CHUNK_BYTES_MAX}",
        )
    if not 1 <= config.stripe <= STRIPE_MAX:
        raise EmberfsError(Code.CONFIG, f"stripe = {config.stripe}: write 1 to {STRIPE_MAX}")
    if not 0 <= config.inline_bytes_max <= INLINE_BYTES_MAX:
        raise EmberfsError(
            Code.CONFIG,
            f"inline_bytes_max = {config.inline_bytes_max}: write 0 to {INLINE_BYTES_MAX}",
        )
    if not (config.mgmtd and config.listen):
        raise EmberfsError(Code.CONFIG, "mgmtd and listen need at least one address each")
    if config.store:
        parse_store(config.store)
    elif not config.data:
        raise EmberfsError(Code.CONFIG, 'name a directory in "data", or a "store"')
    if config.session_grace_s <= 0 or config.start_timeout_s <= 0:
        raise EmberfsError(Code.CONFIG, "session_grace_s and start_timeout_s must be above 0")
    if not 0 <= config.trash_days <= TRASH_DAYS_MAX:
        raise EmberfsError(
            Code.CONFIG, f"trash_days = {config.trash_days}: write 0 (never) to {TRASH_DAYS_MAX}"
        )


class MetaService:
    """One metadata server."""

    def __init__(
        self,
        config: MetaConfig,
        env: Env,
        *,
        wiring: Wiring = REAL,
        open_store: Callable[[str], OrderedStore] = RocksStore,
        share_engine: Callable[[], Engine] | None = None,
    ) -> None:
        """`share_engine`: how to reach a shared store, instead of what `config` says."""
        self._config = config
        self._env = env
        self._wiring = wiring
        self._open_store = open_store
        self._share_engine = share_engine
        self._engine: Engine | None = None
        self._cluster: Cluster | None = None
        self._context: Context | None = None
        self._server: Server | None = None
        self._agent: Agent | None = None
        self._tasks = TaskSet()
        self._incarnation = env.random.getrandbits(63) | 1

    async def start(self) -> None:
        """Open the store, join the cluster, serve. EmberfsError or OSError when it cannot."""
        config, env = self._config, self._env
        timeout_ns = int(config.start_timeout_s * SECOND)
        announcer = Announcer(env)
        self._engine = engine = Announced(await self._open_engine(timeout_ns), announcer)
        CONFLICTS.set_function(lambda: engine.conflicts)
        made = await open_file_system(
            engine, config.cluster, uid=os.getuid(), gid=os.getgid(), now_ns=env.wall_ns()
        )
        if made:
            log.info("made an empty file system for cluster %s", config.cluster)
        self._cluster = await Cluster.open(
            env,
            config.mgmtd,
            config.cluster,
            register=False,
            timeout_ns=timeout_ns,
            wiring=self._wiring,
        )
        await self._serve(engine, announcer, self._cluster, timeout_ns)

    async def _open_engine(self, timeout_ns: int) -> Engine:
        config, env = self._config, self._env
        if self._share_engine is not None:
            return self._share_engine()
        if config.store:
            return await open_engine(env, config.store, timeout_ns=timeout_ns)
        path = os.path.join(config.data, "kv")
        return LocalEngine(env, await env.run_blocking(lambda: self._open_store(path)))

    @property
    def _is_shared(self) -> bool:
        """Tell whether other servers may stand on the same store."""
        store = self._config.store
        return self._share_engine is not None or bool(store and parse_store(store).is_shared)

    async def _serve(
        self, engine: Engine, announcer: Announcer, cluster: Cluster, timeout_ns: int
    ) -> None:
        config, env = self._config, self._env
        policy = Policy(
            config.chunk_bytes,
            config.stripe,
            int(config.trash_days * DAY_NS),
            config.inline_bytes_max,
        )
        self._refuse_beside_others(cluster)
        tenure = self._tenure(cluster)
        guard = ChunkGuard(env, cluster.routing, cluster.peers, tenure)
        context = Context(
            env,
            engine,
            cluster.chunkio,
            lambda: cluster.routing.snapshot,
            policy,
            lambda: self._routing_is_fresh(cluster),
            tenure,
            guard.of,
            announcer,
        )
        self._context = context
        await context.load()
        cluster.routing.subscribe(lambda snapshot: context.clients.look())
        context.clients.look()
        grace_ns = int(config.session_grace_s * SECOND)
        orphans = Orphans(env, engine, cluster.chunkio, lambda: cluster.routing.snapshot, grace_ns)
        await orphans.load()
        self._server = Server(
            env,
            handlers(context),
            name=f"meta {config.node}",
            transports=self._wiring.transports,
        )
        endpoints = [await self._server.listen(endpoint) for endpoint in config.listen]
        self._agent = Agent(
            env, cluster.control, self._node(endpoints), expect=cluster.routing.expect
        )
        await self._agent.start(timeout_ns)
        if isinstance(tenure, Shared):
            tenure.lease = self._agent
        context.start()
        sweeper = SessionSweeper(
            env,
            engine,
            context.collector,
            cluster.chunkio,
            context.trims,
            context.clients,
            tenure,
            grace_ns,
        )
        context.overdue = sweeper.overdue
        self._tasks.spawn(sweeper.live(), name="meta sessions")
        self._tasks.spawn(orphans.live(), name="meta orphans")
        self._tasks.spawn(tree_calls.live(context), name="meta trash")
        log.info("serving at %s", ", ".join(endpoints))

    def _refuse_beside_others(self, cluster: Cluster) -> None:
        """Two servers with a store each would be two file systems. EmberfsError(CONFIG)."""
        nodes = cluster.routing.snapshot.nodes_of(NodeKind.META)
        others = [node for node in nodes if node.alive and node.id != self._config.node]
        if others and not self._is_shared:
            raise EmberfsError(
                Code.CONFIG,
                f"metadata server {others[0].id} on {others[0].host or 'some host'} serves this "
                'cluster; a second one needs the same "store", etcd://..., postgres://... or '
                "fdb://..., in the configuration of both",
            )

    def _tenure(self, cluster: Cluster) -> Tenure:
        config = self._config
        if not self._is_shared:
            return Alone(self._incarnation, config.node)
        return Shared(
            self._env, NodeId(config.node), self._incarnation, lambda: cluster.routing.snapshot
        )

    def _routing_is_fresh(self, cluster: Cluster) -> bool:
        """Tell whether mgmtd has answered lately, and what it knew then is here."""
        agent = self._agent
        return (
            agent is not None
            and agent.lease_ok()
            and cluster.routing.snapshot.version >= agent.told_version
        )

    def _node(self, endpoints: list[str]) -> Node:
        config = self._config
        return Node(
            id=NodeId(config.node),
            kind=NodeKind.META,
            host=config.host,
            endpoints=tuple(endpoints),
            incarnation=self._incarnation,
            alive=True,
            metrics=f"127.0.0.1:{config.metrics_port}" if config.metrics_port else "",
        )

    async def stop(self) -> None:
        """Finish running calls, make everything stable, release the store."""
        if self._agent is not None:
            await self._agent.close()
        if self._server is not None:
            await self._server.close(DRAIN_NS)
        await self._tasks.close()
        if self._context is not None:
            await self._context.close()
        if self._cluster is not None:
            await self._cluster.close()
        if self._engine is not None:
            await self._sync_and_close(self._engine)

    async def _sync_and_close(self, engine: Engine) -> None:
        try:
            await engine.sync()
        except EmberfsError as problem:
            log.error("the last transactions may be lost in a power cut: %s", problem)
        await engine.close()


async def build(config: MetaConfig, env: Env) -> MetaService:
    """Make the service of a checked configuration."""
    check_config(config)
    return MetaService(config, env)


def main() -> None:
    """Entry point of emberfs-meta."""
    run_service("emberfs-meta", MetaConfig, build)
