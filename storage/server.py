"""The storage process: emberfs-storage --config FILE.toml."""

import logging
from collections.abc import Callable

import msgspec

from emberfs.client.agent import Agent
from emberfs.client.lastwill import make_will, revoke_will
from emberfs.client.routing import Routing
from emberfs.client.wiring import REAL, Wiring
from emberfs.fabric.pool import PeerPool
from emberfs.fabric.server import Server
from emberfs.kv.store import OrderedStore
from emberfs.proto.cluster import Node, NodeKind, TargetReport
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND, NodeId, TargetId
from emberfs.runtime.env import Env
from emberfs.runtime.service import run_service
from emberfs.storage.chunks import open_rocks
from emberfs.storage.hosted import HostedTarget
from emberfs.storage.scrub import ScrubSettings
from emberfs.storage.service import StorageService

log = logging.getLogger("emberfs.storage.server")

SERVICES_MAX = 1000
TARGETS_MAX = 99  # target ids are node id * 100 + place
START_TIMEOUT_NS = 20 * SECOND
DRAIN_NS = 1 * SECOND


class StorageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The TOML file of a storage service."""

    cluster: str
    node: int
    mgmtd: tuple[str, ...]
    listen: tuple[str, ...]
    data: str
    metrics_port: int = 0
    log_level: str = "INFO"
    host: str = ""  # name that status shows
    advertise: str = ""  # address that others reach us at, where `listen` says 0.0.0.0
    targets: int = 1
    capacity_bytes: int = 0  # per target; 0 = an equal share of the file system
    services_on_disk: int = 1  # storage services whose data are in the same file system
    sync_bytes_per_s: int = 0  # bound of what recovery sends; 0 = none
    scrub_bytes_per_s: int = 16 << 20  # what the scrubber reads per target; 0 = no scrubbing
    scrub_interval_s: int = 7 * 24 * 3600  # from one pass to the next


class StorageServer:
    """Wires the storage service to the outside world."""

    def __init__(
        self,
        config: StorageConfig,
        env: Env,
        *,
        wiring: Wiring = REAL,
        open_store: Callable[[str], OrderedStore] = open_rocks,
    ) -> None:
        if not 1 <= config.targets <= TARGETS_MAX:
            raise EmberfsError(
                Code.CONFIG, f"targets = {config.targets}: from 1 to {TARGETS_MAX} are possible"
            )
        if not 1 <= config.services_on_disk <= SERVICES_MAX:
            raise EmberfsError(
                Code.CONFIG,
                f"services_on_disk = {config.services_on_disk}: write 1 to {SERVICES_MAX}",
            )
        self._config = config
        self._env = env
        self._wiring = wiring
        self._open_store = open_store
        self._control = wiring.control(config.mgmtd, config.cluster)
        self._routing = Routing(env, self._control)
        self._peers = PeerPool(env, wiring.transports)
        self._agent: Agent | None = None
        self._fabric: Server | None = None
        self.service = StorageService(
            env,
            self._routing,
            self._peers,
            self._targets(),
            lease_ok=self._lease_ok,
            report_now=self._report_now,
            sync_bytes_per_s=config.sync_bytes_per_s,
            scrub=ScrubSettings(config.scrub_bytes_per_s, config.scrub_interval_s),
            services_on_disk=config.services_on_disk,
        )

    def _targets(self) -> dict[TargetId, HostedTarget]:
        config, found = self._config, {}
        for place in range(1, config.targets + 1):
            target = TargetId(config.node * 100 + place)
            path = f"{config.data}/target-{place}"
            found[target] = HostedTarget(
                self._env,
                target,
                path,
                capacity_bytes=config.capacity_bytes,
                open_store=self._open_store,
            )
        return found

    async def start(self) -> None:
        """Listen, learn the routing, open the targets, register."""
        env, config = self._env, self._config
        env.disk.make_directory(config.data)
        self._fabric = Server(
            env,
            self.service.handlers,
            name=f"storage {config.node}",
            quick=self.service.quick,
            transports=self._wiring.transports,
        )
        endpoints = [await self._fabric.listen(endpoint) for endpoint in config.listen]
        node = Node(
            id=NodeId(config.node),
            kind=NodeKind.STORAGE,
            host=config.host or env.host_key,
            endpoints=tuple(self._published(endpoint) for endpoint in endpoints),
            incarnation=env.random.getrandbits(62),
            alive=True,
            metrics=f"127.0.0.1:{config.metrics_port}" if config.metrics_port else "",
        )
        self._agent = Agent(env, self._control, node, self._reports, self._routing.expect)
        # Before the stores open: what the chains expect of us decides how they are taken.
        await self._routing.start(START_TIMEOUT_NS)
        await self.service.open()
        await self._agent.start(START_TIMEOUT_NS)
        make_will(env, self._control, node)
        # mgmtd may have given up on a former life of ours after our first snapshot was sent.
        self._routing.offer(await self._control.routing())

    async def stop(self) -> None:
        """Stop serving, flush, release everything."""
        if self._agent is not None:
            await self._agent.close()
        if self._fabric is not None:
            await self._fabric_close(self._fabric)
        await self.service.close()
        await self._routing.close()
        await self._control.close()
        await self._peers.close()
        revoke_will(self._env)

    async def _fabric_close(self, fabric: Server) -> None:
        # Updates that wait for a successor would outlast any drain: the replicas end them first.
        await self.service.close_replicas()
        await fabric.close(DRAIN_NS)

    def _published(self, endpoint: str) -> str:
        if "//0.0.0.0:" not in endpoint:
            return endpoint
        if not self._config.advertise:
            raise EmberfsError(
                Code.CONFIG, f'listen = "{endpoint}" needs advertise = "the address to reach us at"'
            )
        return endpoint.replace("//0.0.0.0:", f"//{self._config.advertise}:")

    def _reports(self) -> list[TargetReport]:
        return self.service.reports()

    def _lease_ok(self) -> bool:
        agent = self._agent
        if agent is None or not agent.lease_ok():
            return False
        return self._routing.snapshot.version >= agent.needs_version

    def _report_now(self) -> None:
        if self._agent is not None:
            self._agent.beat_soon()


async def build(config: StorageConfig, env: Env) -> StorageServer:
    """Make the service; it does nothing before `start`."""
    return StorageServer(config, env)


def main() -> None:
    """Entry point of emberfs-storage."""
    run_service("emberfs-storage", StorageConfig, build)
