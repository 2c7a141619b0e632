"""A whole cluster in one event loop: the real services on fake machines.

Machines: one that runs the key-value store of the management services, mgmtd1.., meta1.., stor1..,
client1.., and where metadata servers share a store (shared_store.py), one that runs it. Every
service is the class that the real process runs, with the fake network and disk passed in.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec

from emberfs.client.cluster import Cluster
from emberfs.client.connection import CALL_TIMEOUT_NS, Lease
from emberfs.client.control import Control
from emberfs.client.lastwill import Will, carry_out
from emberfs.client.routing import Routing
from emberfs.client.wiring import Wiring
from emberfs.kv.memory import MemoryStore
from emberfs.kv.transaction import Engine
from emberfs.meta.server import MetaConfig, MetaService
from emberfs.mgmtd.events import (
    ChainsRequested,
    DeathReported,
    HeartbeatArrived,
    Registered,
    Timing,
)
from emberfs.mgmtd.manager import Manager
from emberfs.proto.cluster import (
    ClusterId,
    Node,
    NodeKind,
    PublicState,
    RoutingSnapshot,
    TargetReport,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import (
    CHUNK_BYTES_MIN,
    SECOND,
    ChainId,
    NodeId,
    RoutingVersion,
    TargetId,
)
from emberfs.storage.server import StorageConfig, StorageServer
from sim.check_managers import ManagersWatch
from sim.check_versions import Seen
from sim.loop import SimLoop
from sim.machine import Machine, SimEnv, as_env
from sim.network import Network, SimTransport, remote, remote_stream
from sim.shared_store import STORE as ROWS
from sim.shared_store import SharedEngine, SharedRows
from sim.tap import CONTROL, STORE

T = TypeVar("T")

CLUSTER = "sim"
LEASE_NS = 5 * SECOND
HEARTBEAT_NS = 1 * SECOND
KV_TIMEOUT_NS = 2 * SECOND
STREAM_SILENCE_NS = 4 * SECOND
MGMTD_PORT = 9000
INLINE_BYTES = 4096  # many files of the load grow over it
SCRUB_S = 6
SCRUB_BYTES_PER_S = 16 << 20


@dataclass(frozen=True)
class Shape:
    """How large the cluster is."""

    mgmtd: int = 2
    meta: int = 0
    shared: bool = False  # all metadata servers stand on one store
    storage: int = 3
    chains: int = 2
    replicas: int = 3
    clients: int = 3
    scrub: bool = True  # the scrubber mends what differs


class World:
    """The machines of one simulation, and what was observed at them."""

    def __init__(self, loop: SimLoop, seed: int, shape: Shape) -> None:
        self.loop = loop
        self.shape = shape
        self._seed = seed
        self.network = Network(loop, self.dice_of("network"))
        self.machines: dict[str, Machine] = {}
        self.kv = self._machine("kv")
        self.mgmtd = [self._machine(f"mgmtd{n + 1}") for n in range(shape.mgmtd)]
        self.meta = [self._machine(f"meta{n + 1}") for n in range(shape.meta)]
        self.rows = self._machine("rows") if shape.shared else self.kv
        self.maybe_share = 0.0  # of the commits to it, see shared_store.py
        self.storage = [self._machine(f"stor{n + 1}") for n in range(shape.storage)]
        self.clients = [self._machine(f"client{n + 1}") for n in range(shape.clients)]
        self.addresses = tuple(f"{machine.name}:{MGMTD_PORT}" for machine in self.mgmtd)
        self.seen: list[Seen] = []  # routing, as every process has heard of it
        self.engine: Engine | None = None
        self.managers = ManagersWatch(self)
        self.scrub_findings = 0  # of storage processes that are dead

    def _machine(self, name: str) -> Machine:
        machine = Machine(name, self.loop, self.network, self.dice_of(name))
        self.machines[name] = machine
        return machine

    def dice_of(self, name: str) -> random.Random:
        """Dice of one's own: a machine more or a load more does not change what others throw."""
        return random.Random(f"{self._seed} {name}")

    # ------------------------------------------------------------ life

    async def boot(self) -> None:
        """Start everything and create the chains."""
        shared = (self.rows,) if self.shape.shared else ()
        for machine in (self.kv, *shared, *self.mgmtd, *self.storage, *self.clients):
            self.start(machine)
        self.loop.create_task(self.managers.run())
        await self._create_chains()
        for machine in self.meta:
            self.start(machine)

    def start(self, machine: Machine) -> None:
        """Start the process that belongs on a machine."""
        kind = machine.name.rstrip("0123456789")
        number = int(machine.name[len(kind) :] or 0)
        begin: Callable[[SimEnv], Coroutine[Any, Any, None]] = {
            "kv": lambda env: self._live_kv(machine, env),
            "rows": lambda env: self._live_rows(machine, env),
            "mgmtd": lambda env: self._live_mgmtd(machine, env, number),
            "meta": lambda env: self._live_meta(machine, env, number),
            "stor": lambda env: self._live_storage(machine, env, number),
            "client": lambda env: self._live_client(machine, env),
        }[kind]
        machine.service = None
        machine.start(begin)
        assert machine.process is not None
        machine.process.watchers.append(lambda: self._count_findings(machine))

    def _count_findings(self, machine: Machine) -> None:
        """Note what the scrubbers of a process that dies have found."""
        if isinstance(machine.service, StorageServer):
            self.scrub_findings += scrub_findings(machine.service)

    async def _live_kv(self, machine: Machine, env: SimEnv) -> None:
        machine.service = Engine(env, machine.disk.open_store("/kv"))

    async def _live_rows(self, machine: Machine, env: SimEnv) -> None:
        machine.service = SharedRows(env, machine.disk.stores.setdefault(ROWS, MemoryStore()))

    async def _live_mgmtd(self, machine: Machine, env: SimEnv, number: int) -> None:
        own = Node(
            id=NodeId(number),
            kind=NodeKind.MGMTD,
            host=machine.name,
            endpoints=(f"grpc://{machine.name}:{MGMTD_PORT}",),
            incarnation=env.random.getrandbits(62) | 1,
            alive=True,
        )
        engine = RemoteEngine(self, machine)
        manager = Manager(env, engine, CLUSTER, own, Timing(LEASE_NS, HEARTBEAT_NS))
        await manager.start()
        machine.service = manager

    async def _report_death(self, machine: Machine, env: SimEnv, words: str) -> None:
        control = self.wiring(machine).control(self.addresses, CLUSTER)
        await carry_out(as_env(env), control, msgspec.json.decode(words, type=Will))
        self.network.counts["death reported"] += 1

    async def _live_storage(self, machine: Machine, env: SimEnv, number: int) -> None:
        machine.heir = partial(self._report_death, machine)
        config = StorageConfig(
            cluster=CLUSTER,
            node=10 + number,
            mgmtd=self.addresses,
            listen=(f"sim://{machine.name}:0",),
            data="/data",
            targets=self.targets_per_node,
            scrub_bytes_per_s=SCRUB_BYTES_PER_S if self.shape.scrub else 0,
            scrub_interval_s=SCRUB_S,
        )
        while True:
            server = StorageServer(
                config, env, wiring=self.wiring(machine), open_store=machine.disk.open_store
            )
            self._observe(machine, server._routing)
            try:
                await server.start()
                break
            except EmberfsError:  # a real one would be started again by systemd
                await server.stop()
                await env.sleep_ns(SECOND)
        machine.service = server

    async def _live_meta(self, machine: Machine, env: SimEnv, number: int) -> None:
        config = MetaConfig(
            cluster=CLUSTER,
            node=100 + number,
            mgmtd=self.addresses,
            listen=(f"sim://{machine.name}:0",),
            data="/meta",
            chunk_bytes=CHUNK_BYTES_MIN,
            session_grace_s=10.0,
            inline_bytes_max=INLINE_BYTES,
        )
        while True:
            shared = self.shape.shared
            service = MetaService(
                config,
                env,
                wiring=self.wiring(machine),
                open_store=machine.disk.open_store,
                share_engine=(lambda: SharedEngine(self, machine, env)) if shared else None,
            )
            try:
                await service.start()
                break
            except EmberfsError:
                await service.stop()
                await env.sleep_ns(SECOND)
        machine.service = service

    async def _live_client(self, machine: Machine, env: SimEnv) -> None:
        while True:
            try:
                cluster = await Cluster.open(
                    env, self.addresses, CLUSTER, wiring=self.wiring(machine), host=machine.name
                )
                self._observe(machine, cluster.routing)
                machine.service = cluster
                return
            except EmberfsError:
                await env.sleep_ns(SECOND)

    # ------------------------------------------------------------ chains

    @property
    def targets_per_node(self) -> int:
        """So many that every chain has its replicas on different nodes."""
        return -(-self.shape.chains * self.shape.replicas // self.shape.storage)

    def chains(self) -> list[tuple[ChainId, tuple[TargetId, ...]]]:
        """Replicas of each chain, the head first."""
        shape, used = self.shape, [0] * self.shape.storage
        found = []
        for chain in range(shape.chains):
            targets = []
            for replica in range(shape.replicas):
                node = (chain + replica) % shape.storage
                used[node] += 1
                targets.append(TargetId((11 + node) * 100 + used[node]))
            found.append((ChainId(chain + 1), tuple(targets)))
        return found

    async def _create_chains(self) -> None:
        control = self.wiring(self.clients[0]).control(self.addresses, CLUSTER)
        process = self.clients[0].process
        assert process is not None
        done = self.loop.create_future()

        async def create() -> None:
            while True:
                try:
                    await control.create_chains(self.chains())
                    break
                except EmberfsError as problem:
                    if problem.code == Code.EXISTS:
                        break
                    await _pause()
            done.set_result(None)

        process.context.run(self.loop.create_task, create())
        await done

    async def until_serving(self, bound_ns: int) -> bool:
        """Wait until all replicas serve; False if that takes longer than `bound_ns`."""
        return await self._until(self.serving, bound_ns)

    async def until_complete(self, bound_ns: int) -> bool:
        """Wait until all replicas serve in their own opinion too, as mgmtd may be behind."""
        return await self._until(self.complete, bound_ns)

    async def _until(self, condition: Callable[[], bool], bound_ns: int) -> bool:
        end_s = self.loop.time() + bound_ns / 1e9
        while self.loop.time() < end_s:
            if condition():
                return True
            await _pause()
        return False

    def complete(self) -> bool:
        """Tell whether every replica serves, in its own opinion too."""
        servers = [machine.service for machine in self.storage if machine.running]
        hosted = [h for s in servers if s is not None for h in s.service.targets.values()]
        all_here = len(hosted) == self.shape.storage * self.targets_per_node
        members = {target for _, targets in self.chains() for target in targets}
        return (
            all_here
            and self.serving()
            and all(h.state.serves for h in hosted if h.target in members)
        )

    def serving(self) -> bool:
        """Tell whether a mgmtd leads, knows all chains and says that every replica serves."""
        for machine in self.mgmtd:
            if machine.running and machine.service is not None and machine.service.leads:
                chains = machine.service.snapshot.chains
                states = [t.state for chain in chains.values() for t in chain.targets]
                everyone = len(states) == self.shape.chains * self.shape.replicas
                return everyone and all(state == PublicState.SERVING for state in states)
        return False

    def primary_snapshot(self) -> RoutingSnapshot | None:
        """What the leading mgmtd publishes."""
        for machine in self.mgmtd:
            if machine.running and machine.service is not None and machine.service.leads:
                snapshot: RoutingSnapshot = machine.service.snapshot
                return snapshot
        return None

    # ------------------------------------------------------------ wiring

    def wiring(self, machine: Machine) -> Wiring:
        """What a process on this machine dials with."""

        def control(addresses: Sequence[str], cluster: str) -> Control:
            return Control(
                addresses, cluster, connect=lambda address: SimConnection(self, machine, address)
            )

        return Wiring({"sim": SimTransport(self.network)}, control)

    def _observe(self, machine: Machine, routing: Routing) -> None:
        """Note every routing snapshot that a process goes by from now on."""
        routing.subscribe(lambda snapshot: self._hear(machine, snapshot))

    def _hear(self, machine: Machine, snapshot: RoutingSnapshot) -> None:
        now_ns = self.loop.now_ns()
        content = repr(sorted(snapshot.chains.items()))
        place = f"{machine.name}.{machine.lives}"
        self.seen.append(Seen(place, "routing", "", snapshot.version, now_ns, content))
        for chain in snapshot.chains.values():
            seen = Seen(place, "chain", chain.id, chain.version, now_ns, repr(chain))
            self.seen.append(seen)


def scrub_findings(server: StorageServer) -> int:
    """What the scrubbers of a process have found to be wrong."""
    scrubbers = [hosted._scrubber for hosted in server.service.targets.values()]
    return sum(scrubber.findings for scrubber in scrubbers if scrubber is not None)


async def _pause() -> None:
    await asyncio.sleep(0.1)


class RemoteEngine:
    """kv.transactions.Transactions behind the network: a commit may be lost, or its answer."""

    def __init__(self, world: World, machine: Machine) -> None:
        self._world = world
        self._machine = machine

    async def run(
        self,
        work: Callable[[Any], Awaitable[T]],
        *,
        read_only: bool = False,
        durable: bool = False,
    ) -> T:
        """See Transactions."""
        kv = self._world.kv

        async def there() -> T:
            engine = kv.service
            if engine is None:
                raise EmberfsError(Code.UNREACHABLE, "the store starts")
            found: T = await engine.run(work, read_only=read_only, durable=durable)
            return found

        return await self._remote(there)

    async def sync(self) -> None:
        """See Transactions."""
        await self._remote(lambda: self._world.kv.service.sync())

    async def close(self) -> None:
        """Nothing to release here."""

    async def _remote(self, work: Callable[[], Awaitable[T]]) -> T:
        world, kv = self._world, self._world.kv
        return await remote(
            world.network,
            self._machine.name,
            kv.name,
            lambda: kv.process,
            work,
            KV_TIMEOUT_NS,
            STORE,
        )


class SimConnection:
    """client.connection.Connection to one mgmtd."""

    def __init__(self, world: World, machine: Machine, address: str) -> None:
        self._world = world
        self._here = machine
        self._there = world.machines[address.rpartition(":")[0]]

    async def _call(self, cluster: ClusterId, event: Any) -> Any:
        there = self._there

        async def work() -> Any:
            manager = _manager_of(there)
            manager.check_cluster(cluster)
            return await manager.request(event), manager.timing, manager.snapshot.identity

        return await remote(
            self._world.network,
            self._here.name,
            there.name,
            lambda: there.process,
            work,
            CALL_TIMEOUT_NS,
            CONTROL,
        )

    async def register(
        self, cluster: ClusterId, node: Node, reports: Sequence[TargetReport]
    ) -> Lease:
        """See Connection."""
        return _lease(*await self._call(cluster, Registered(node, tuple(reports))))

    async def heartbeat(
        self,
        cluster: ClusterId,
        node_id: NodeId,
        kind: NodeKind,
        incarnation: int,
        reports: Sequence[TargetReport],
        client: int,
    ) -> Lease:
        """See Connection."""
        event = HeartbeatArrived(node_id, kind, incarnation, tuple(reports))
        return _lease(*await self._call(cluster, event))

    async def report_death(self, cluster: ClusterId, node_id: NodeId, incarnation: int) -> None:
        """See Connection."""
        await self._call(cluster, DeathReported(node_id, incarnation))

    async def create_chains(
        self, cluster: ClusterId, chains: Sequence[tuple[ChainId, tuple[TargetId, ...]]]
    ) -> list[ChainId]:
        """See Connection."""
        answer, _, _ = await self._call(cluster, ChainsRequested(tuple(chains)))
        return list(answer.created)

    async def watch(
        self, cluster: ClusterId, have_version: RoutingVersion
    ) -> AsyncGenerator[RoutingSnapshot, None]:
        """See Connection."""
        there = self._there

        def begin() -> AsyncGenerator[RoutingSnapshot, None]:
            manager = _manager_of(there)
            manager.check_cluster(cluster)
            return manager.watch(have_version)

        stream = remote_stream(
            self._world.network,
            self._here.name,
            there.name,
            lambda: there.process,
            begin,
            STREAM_SILENCE_NS,
        )
        try:
            async for snapshot in stream:
                yield snapshot
        finally:
            await stream.aclose()

    async def close(self) -> None:
        """Nothing stays open."""


def _manager_of(machine: Machine) -> Manager:
    manager = machine.service
    if not isinstance(manager, Manager):
        raise EmberfsError(Code.UNREACHABLE, f"{machine.name} starts")
    return manager


def _lease(answer: Any, timing: Timing, identity: int) -> Lease:
    return Lease(timing.lease_ns, timing.heartbeat_ns, answer.version, identity)
