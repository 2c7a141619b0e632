"""Calls to the management service over gRPC, as plain structs and EmberfsError.

Several addresses are tried in turn, beginning with the one that answered last. A mgmtd that was
killed and comes back on its port is found within a second: reconnection is tried at least twice
per second, and a peer that stays silent for some seconds counts as gone.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

import grpc
import grpc.aio
import msgspec

from emberfs.proto import control_pb2 as pb
from emberfs.proto.cluster import Node, NodeKind, RoutingSnapshot, TargetReport
from emberfs.proto.control_pb2_grpc import MgmtdStub
from emberfs.proto.control_wire import (
    CODE_METADATA,
    node_to_wire,
    report_to_wire,
    routing_from_wire,
)
from emberfs.proto.errors import Code, EmberfsError, code_of
from emberfs.proto.ids import MS, SECOND, ChainId, NodeId, RoutingVersion, TargetId

T = TypeVar("T")

CALL_TIMEOUT_NS = 2 * SECOND
_TIMEOUT_S = CALL_TIMEOUT_NS / SECOND
_NOTHING_SEEN = RoutingVersion(0)
MESSAGE_BYTES_MAX = 256 << 20

CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also the time limit of one attempt
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)


class Lease(msgspec.Struct, frozen=True, gc=False):
    """What mgmtd grants with a registration or heartbeat."""

    lease_ns: int
    heartbeat_ns: int
    version: RoutingVersion  # of its newest snapshot


class Control:
    """A client of mgmtd. Must be created, used and closed on one event loop."""

    def __init__(self, mgmtd: Sequence[str], cluster: str) -> None:
        """`mgmtd`: "host:port" of each management service."""
        if not mgmtd:
            raise EmberfsError(Code.CONFIG, 'no address of mgmtd given; set "mgmtd"')
        self.addresses = tuple(mgmtd)
        self.cluster = cluster
        self._current = 0
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closed = False

    async def register(self, node: Node, reports: Sequence[TargetReport] = ()) -> Lease:
        """Announce a process. UNREACHABLE, WRONG_CLUSTER, NODE_ID_TAKEN, INVALID."""
        request = pb.RegisterRequest(
            cluster=self.cluster, node=node_to_wire(node), targets=map(report_to_wire, reports)
        )
        reply = await self._call(lambda stub: stub.Register(request, timeout=_TIMEOUT_S))
        return _lease(reply)

    async def heartbeat(
        self,
        node_id: NodeId,
        kind: NodeKind,
        incarnation: int,
        reports: Sequence[TargetReport] = (),
        client: int = 0,
    ) -> Lease:
        """Renew the lease. UNREACHABLE, WRONG_CLUSTER, NOT_REGISTERED, INVALID."""
        request = pb.HeartbeatRequest(
            cluster=self.cluster,
            node=node_id,
            kind=pb.NodeKind.ValueType(kind),
            incarnation=incarnation,
            targets=map(report_to_wire, reports),
            client=client,
        )
        reply = await self._call(lambda stub: stub.Heartbeat(request, timeout=_TIMEOUT_S))
        return _lease(reply)

    async def create_chains(
        self, chains: Sequence[tuple[ChainId, tuple[TargetId, ...]]]
    ) -> list[ChainId]:
        """Create chains, head first, all or none; return the new ones. EXISTS, INVALID."""
        new = [
            pb.CreateChainsRequest.NewChain(id=number, targets=targets)
            for number, targets in chains
        ]
        request = pb.CreateChainsRequest(cluster=self.cluster, chains=new)
        reply: pb.CreateChainsReply = await self._call(
            lambda stub: stub.CreateChains(request, timeout=_TIMEOUT_S)
        )
        return [ChainId(number) for number in reply.created]

    async def routing(self) -> RoutingSnapshot:
        """Return the newest snapshot, asked for now. UNREACHABLE, WRONG_CLUSTER."""

        async def first(stub: MgmtdStub) -> pb.Routing:
            request = pb.WatchRoutingRequest(cluster=self.cluster)
            call = stub.WatchRouting(request, timeout=_TIMEOUT_S)
            try:
                message: pb.Routing
                async for message in call:
                    return message
            finally:
                call.cancel()
            raise EmberfsError(Code.UNREACHABLE, "mgmtd stops")

        return self._accept(await self._call(first))

    async def watch(
        self, have_version: RoutingVersion = _NOTHING_SEEN
    ) -> AsyncGenerator[RoutingSnapshot, None]:
        """Yield every snapshot newer than `have_version` as it is published.

        Ends when mgmtd stops in an orderly way. UNREACHABLE, WRONG_CLUSTER; TOO_OLD when this mgmtd
        has never published a version as high as `have_version`.
        """
        address = self._address()
        request = pb.WatchRoutingRequest(cluster=self.cluster, have_version=have_version)
        call = self._stub(address).WatchRouting(request)
        try:
            async for message in call:
                yield self._accept(message)
        except grpc.aio.AioRpcError as problem:
            self._leave(address)
            raise _explained(problem, address) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """End all calls and connections."""
        self._closed = True
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    def _address(self) -> str:
        return self.addresses[self._current % len(self.addresses)]

    def _leave(self, address: str) -> None:
        """Go on to the next address, unless another call has done so."""
        if self._address() == address:
            self._current += 1

    def _stub(self, address: str) -> MgmtdStub:
        if self._closed:
            raise EmberfsError(Code.SHUTTING_DOWN, "the connection to mgmtd is closed")
        channel = self._channels.get(address)
        if channel is None:
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            self._channels[address] = channel
        return MgmtdStub(channel)

    async def _call(self, call: Callable[[MgmtdStub], Awaitable[T]]) -> T:
        """Call one address after another until one answers."""
        problems: list[str] = []
        for _ in self.addresses:
            address = self._address()
            stub = self._stub(address)
            try:
                return await call(stub)
            except grpc.aio.AioRpcError as problem:
                explained = _explained(problem, address)
                if explained.code not in (Code.UNREACHABLE, Code.SHUTTING_DOWN):
                    raise explained from None
                problems.append(explained.message)
                self._leave(address)
        raise EmberfsError(Code.UNREACHABLE, "; ".join(problems))

    def _accept(self, message: pb.Routing) -> RoutingSnapshot:
        if message.cluster != self.cluster:
            raise EmberfsError(
                Code.WRONG_CLUSTER,
                f'mgmtd at {self._address()} serves cluster "{message.cluster}", not '
                f'"{self.cluster}"',
            )
        return routing_from_wire(message)


def _lease(reply: pb.RegisterReply | pb.HeartbeatReply) -> Lease:
    return Lease(
        lease_ns=reply.lease_ms * MS,
        heartbeat_ns=reply.heartbeat_ms * MS,
        version=RoutingVersion(reply.routing_version),
    )


def _explained(problem: grpc.aio.AioRpcError, address: str) -> EmberfsError:
    """Return what mgmtd itself said, or else what the failure of the call means."""
    details = problem.details() or ""
    for key, value in problem.trailing_metadata() or ():
        if key == CODE_METADATA:
            return EmberfsError(code_of(int(value)), details)
    match problem.code():
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
            return EmberfsError(
                Code.UNREACHABLE,
                f"mgmtd at {address} does not answer ({details}); check that emberfs-mgmtd runs "
                "there and that the address and port are right",
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return EmberfsError(
                Code.CONFIG, f"what listens at {address} is not emberfs-mgmtd ({details})"
            )
        case grpc.StatusCode.CANCELLED:
            return EmberfsError(Code.CANCELLED, f"the call to mgmtd at {address} was cancelled")
        case status:
            return EmberfsError(Code.INTERNAL, f"mgmtd at {address}: {status.name} {details}")
