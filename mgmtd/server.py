"""The management service on gRPC: messages in, events to the manager, answers out."""

import logging
import os
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from emberfs.kv.keys import Prefix
from emberfs.kv.memory import MemoryStore
from emberfs.kv.rocks import RocksStore
from emberfs.kv.transactions import Transactions
from emberfs.kv.url import parse_store, remote_engine
from emberfs.mgmtd import metrics
from emberfs.mgmtd.embedded import EmbeddedEngine
from emberfs.mgmtd.events import (
    ChainsRequested,
    DeathReported,
    HeartbeatArrived,
    Registered,
    Timing,
)
from emberfs.mgmtd.manager import Manager
from emberfs.mgmtd.peers import PeerCheck
from emberfs.proto import control_pb2 as pb
from emberfs.proto.cluster import ClusterId, Node, NodeKind, RoutingSnapshot
from emberfs.proto.control_pb2_grpc import MgmtdServicer, add_MgmtdServicer_to_server
from emberfs.proto.control_wire import (
    CODE_METADATA,
    kind_from_wire,
    node_from_wire,
    reports_from_wire,
    routing_to_wire,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, ChainId, NodeId, TargetId
from emberfs.runtime.env import Env
from emberfs.runtime.service import run_service
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.mgmtd.server")

T = TypeVar("T")

SERVICE = pb.DESCRIPTOR.services_by_name["Mgmtd"].full_name
STOP_GRACE_S = 0.5

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second mgmtd binds the same port in silence
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)

_STATUS = {
    Code.WRONG_CLUSTER: grpc.StatusCode.INVALID_ARGUMENT,
    Code.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Code.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    Code.NOT_REGISTERED: grpc.StatusCode.NOT_FOUND,
    Code.NODE_ID_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    Code.EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Code.TOO_OLD: grpc.StatusCode.FAILED_PRECONDITION,
    Code.NOT_PRIMARY: grpc.StatusCode.FAILED_PRECONDITION,
    Code.SHUTTING_DOWN: grpc.StatusCode.UNAVAILABLE,
}


class MgmtdConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of emberfs-mgmtd."""

    cluster: str
    data: str = ""  # directory of the cluster's state
    store: str = ""  # instead: see kv/url.py; several mgmtd may share one
    peers: tuple[str, ...] = ()  # "ip:port" of the other mgmtd that share the store
    node: int = 1
    listen: str = "127.0.0.1:9000"  # port 0: any
    lease_s: float = 5.0
    heartbeat_s: float = 1.0
    metrics_port: int = 0
    log_level: str = "INFO"


def timing_of(config: MgmtdConfig) -> Timing:
    """Return the timing that a configuration asks for. EmberfsError(CONFIG) if it cannot work."""
    if not 0 < config.heartbeat_s <= config.lease_s / 4 or config.lease_s < 0.1:
        raise EmberfsError(
            Code.CONFIG,
            f"lease_s = {config.lease_s:g} with heartbeat_s = {config.heartbeat_s:g}: a lease "
            "must be 0.1 s at least and as long as four heartbeats, since half of it fences",
        )
    if not config.cluster:
        raise EmberfsError(Code.CONFIG, 'cluster = "" names no cluster; choose a name')
    return Timing(round(config.lease_s * SECOND), round(config.heartbeat_s * SECOND))


class MgmtdServer:
    """The running service."""

    def __init__(self, config: MgmtdConfig, env: Env, engine: Transactions) -> None:
        """`engine` is closed with the service."""
        own = Node(
            id=NodeId(config.node),
            kind=NodeKind.MGMTD,
            host=env.host_key,
            endpoints=(f"grpc://{config.listen}",),
            incarnation=env.random.getrandbits(63),
            alive=True,
            metrics=f"127.0.0.1:{config.metrics_port}" if config.metrics_port else "",
        )
        self.address = config.listen  # with the real port once started
        self._engine = engine
        # Its own RocksDB, which no other process can open: no predecessor is waited for. The keys
        # in `data` have no prefix, as there is nothing else in it.
        shared = bool(config.store) and parse_store(config.store).is_shared
        prefix = bytes(Prefix.MGMTD.value) if config.store else b""
        self.manager = Manager(
            env, engine, config.cluster, own, timing_of(config), exclusive=not shared, prefix=prefix
        )
        self._peers = PeerCheck(env, config.cluster, config.peers, self.manager.stored_identity)
        self._tasks = TaskSet()
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()

    async def start(self) -> None:
        """Load the cluster and serve. EmberfsError says what is wrong and what to do."""
        server = grpc.aio.server(options=SERVER_OPTIONS)
        self._server = server
        add_MgmtdServicer_to_server(_Servicer(self.manager), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self.address = _bind(server, self.address)
        await self._peers.once()
        await self.manager.start()
        await server.start()
        self._tasks.spawn(self._watch_peers(), name="mgmtd peers")
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("cluster %s is managed at %s", self.manager.cluster, self.address)

    async def _watch_peers(self) -> None:
        try:
            await self._peers.live()
        except EmberfsError as problem:
            log.error("%s; this one stops", problem.message)
            signal.raise_signal(signal.SIGTERM)

    async def stop(self) -> None:
        """End the streams, answer what has arrived, close the store."""
        await self._tasks.close()
        await self._health.enter_graceful_shutdown()
        await self.manager.close()
        await self._engine.close()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)


def _bind(server: grpc.aio.Server, address: str) -> str:
    """Bind; return the address with its real port."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise EmberfsError(Code.CONFIG, f'listen = "{address}": write it as "127.0.0.1:9000"')
    try:
        _probe(host.strip("[]"), int(port))
        bound = server.add_insecure_port(address)
    except (OSError, RuntimeError) as problem:
        number = getattr(problem, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else str(problem)
        raise EmberfsError(
            Code.CONFIG,
            f"cannot listen on {address}: {reason}; stop the process that uses the port or set "
            'another "listen"',
        ) from None
    return f"{host}:{bound}"


def _probe(host: str, port: int) -> None:
    """Bind once by hand: gRPC prints its own lines about a failure, and hides the reason."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, port), family=family).close()


_Request: TypeAlias = (
    pb.RegisterRequest
    | pb.HeartbeatRequest
    | pb.ReportDeathRequest
    | pb.CreateChainsRequest
    | pb.WatchRoutingRequest
)


class _Servicer(MgmtdServicer):
    """Translates; decides nothing."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._wire: pb.Routing | None = None  # the newest snapshot as a message

    async def Register(  # noqa: N802
        self, request: pb.RegisterRequest, context: grpc.aio.ServicerContext
    ) -> pb.RegisterReply:
        """See control.proto."""

        async def answer() -> pb.RegisterReply:
            node, reports = node_from_wire(request.node), reports_from_wire(request.targets)
            granted = await self._manager.request(Registered(node, reports))
            timing = self._manager.timing
            return pb.RegisterReply(
                lease_ms=timing.lease_ns // MS,
                heartbeat_ms=timing.heartbeat_ns // MS,
                routing_version=granted.version,
                identity=self._manager.snapshot.identity,
            )

        return await self._answer("Register", request, context, answer)

    async def Heartbeat(  # noqa: N802
        self, request: pb.HeartbeatRequest, context: grpc.aio.ServicerContext
    ) -> pb.HeartbeatReply:
        """See control.proto."""

        async def answer() -> pb.HeartbeatReply:
            event = HeartbeatArrived(
                node=NodeId(request.node),
                kind=kind_from_wire(request.kind),
                incarnation=request.incarnation,
                reports=reports_from_wire(request.targets),
            )
            granted = await self._manager.request(event)
            timing = self._manager.timing
            return pb.HeartbeatReply(
                routing_version=granted.version,
                lease_ms=timing.lease_ns // MS,
                heartbeat_ms=timing.heartbeat_ns // MS,
                identity=self._manager.snapshot.identity,
            )

        return await self._answer("Heartbeat", request, context, answer)

    async def ReportDeath(  # noqa: N802
        self, request: pb.ReportDeathRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReportDeathReply:
        """See control.proto."""

        async def answer() -> pb.ReportDeathReply:
            event = DeathReported(NodeId(request.node), request.incarnation)
            granted = await self._manager.request(event)
            return pb.ReportDeathReply(routing_version=granted.version)

        return await self._answer("ReportDeath", request, context, answer)

    async def CreateChains(  # noqa: N802
        self, request: pb.CreateChainsRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateChainsReply:
        """See control.proto."""

        async def answer() -> pb.CreateChainsReply:
            chains = tuple(
                (ChainId(new.id), tuple(TargetId(target) for target in new.targets))
                for new in request.chains
            )
            granted = await self._manager.request(ChainsRequested(chains))
            return pb.CreateChainsReply(routing_version=granted.version, created=granted.created)

        return await self._answer("CreateChains", request, context, answer)

    async def WatchRouting(  # noqa: N802
        self, request: pb.WatchRoutingRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.Routing]:
        """See control.proto."""

        async def follow() -> AsyncGenerator[RoutingSnapshot, None]:
            return self._manager.watch(request.have_version)

        stream = await self._answer("WatchRouting", request, context, follow)
        try:
            async for snapshot in stream:
                if self._wire is None or self._wire.version != snapshot.version:
                    self._wire = routing_to_wire(snapshot)
                yield self._wire
        except EmberfsError as problem:
            await _abort(context, problem)
        finally:
            await stream.aclose()

    async def _answer(
        self,
        method: str,
        request: _Request,
        context: grpc.aio.ServicerContext,
        answer: Callable[[], Awaitable[T]],
    ) -> T:
        """Check the cluster, answer, and turn an EmberfsError into a status."""
        try:
            self._manager.check_cluster(ClusterId(request.cluster, request.identity))
            reply = await answer()
        except EmberfsError as problem:
            metrics.RPCS.labels(method, problem.code.name.lower()).inc()
            await _abort(context, problem)
        metrics.RPCS.labels(method, "ok").inc()
        return reply


async def _abort(context: grpc.aio.ServicerContext, problem: EmberfsError) -> NoReturn:
    await context.abort(
        _STATUS.get(problem.code, grpc.StatusCode.INTERNAL),
        problem.message,
        ((CODE_METADATA, str(int(problem.code))),),
    )
    raise AssertionError("abort raises")


async def build(config: MgmtdConfig, env: Env) -> MgmtdServer:
    """Make the service from its settings."""
    return MgmtdServer(config, env, open_state(config, env))


def open_state(config: MgmtdConfig, env: Env) -> Transactions:
    """Return the engine of the cluster's state. EmberfsError(CONFIG) if none is named."""
    if not config.store:
        if not config.data:
            raise EmberfsError(Code.CONFIG, 'name a directory in "data", or a "store"')
        return EmbeddedEngine(env, lambda: RocksStore(f"{config.data}/state"))
    url = parse_store(config.store)
    if url.kind == "memory":
        return EmbeddedEngine(env, MemoryStore)
    if url.kind == "rocks":
        return EmbeddedEngine(env, lambda: RocksStore(url.path))
    return remote_engine(env, url)


def main() -> None:
    """Entry point of emberfs-mgmtd."""
    run_service("emberfs-mgmtd", MgmtdConfig, build)


if __name__ == "__main__":
    main()
