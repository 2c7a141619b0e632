"""One management service over gRPC, as plain structs and EmberfsError.

A mgmtd that was killed and comes back on its port is found within a second: reconnection is tried
at least twice per second, and a peer that stays silent for some seconds counts as gone.
"""

import os
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import TypeVar

# Left to itself, gRPC starts threads in every forked child, which go on with the sockets of the
# parent and crash. It reads this when its first channel is made.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
import grpc.aio

from emberfs.client.connection import CALL_TIMEOUT_NS, Lease
from emberfs.proto import control_pb2 as pb
from emberfs.proto.cluster import ClusterId, Node, NodeKind, RoutingSnapshot, TargetReport
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

_TIMEOUT_S = CALL_TIMEOUT_NS / SECOND
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


class GrpcConnection:
    """A channel that is opened by its first call."""

    def __init__(self, address: str) -> None:
        """`address`: "host:port"."""
        self._address = address
        self._channel: grpc.aio.Channel | None = None

    async def register(
        self, cluster: ClusterId, node: Node, reports: Sequence[TargetReport]
    ) -> Lease:
        """See Control.register."""
        request = pb.RegisterRequest(
            cluster=cluster.name,
            identity=cluster.identity,
            node=node_to_wire(node),
            targets=map(report_to_wire, reports),
        )
        return _lease(await self._call(self._stub().Register(request, timeout=_TIMEOUT_S)))

    async def heartbeat(
        self,
        cluster: ClusterId,
        node_id: NodeId,
        kind: NodeKind,
        incarnation: int,
        reports: Sequence[TargetReport],
        client: int,
    ) -> Lease:
        """See Control.heartbeat."""
        request = pb.HeartbeatRequest(
            cluster=cluster.name,
            identity=cluster.identity,
            node=node_id,
            kind=pb.NodeKind.ValueType(kind),
            incarnation=incarnation,
            targets=map(report_to_wire, reports),
            client=client,
        )
        return _lease(await self._call(self._stub().Heartbeat(request, timeout=_TIMEOUT_S)))

    async def report_death(self, cluster: ClusterId, node_id: NodeId, incarnation: int) -> None:
        """See Control.report_death."""
        request = pb.ReportDeathRequest(
            cluster=cluster.name, identity=cluster.identity, node=node_id, incarnation=incarnation
        )
        await self._call(self._stub().ReportDeath(request, timeout=_TIMEOUT_S))

    async def create_chains(
        self, cluster: ClusterId, chains: Sequence[tuple[ChainId, tuple[TargetId, ...]]]
    ) -> list[ChainId]:
        """See Control.create_chains."""
        new = [
            pb.CreateChainsRequest.NewChain(id=number, targets=targets)
            for number, targets in chains
        ]
        request = pb.CreateChainsRequest(
            cluster=cluster.name, identity=cluster.identity, chains=new
        )
        reply = await self._call(self._stub().CreateChains(request, timeout=_TIMEOUT_S))
        return [ChainId(number) for number in reply.created]

    async def watch(
        self, cluster: ClusterId, have_version: RoutingVersion
    ) -> AsyncGenerator[RoutingSnapshot, None]:
        """See Control.watch."""
        request = pb.WatchRoutingRequest(
            cluster=cluster.name, identity=cluster.identity, have_version=have_version
        )
        call = self._stub().WatchRouting(request)
        try:
            async for message in call:
                yield routing_from_wire(message)
        except grpc.aio.AioRpcError as problem:
            raise _explained(problem, self._address) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """End all calls."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _stub(self) -> MgmtdStub:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        return MgmtdStub(self._channel)

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as problem:
            raise _explained(problem, self._address) from None


def _lease(reply: pb.RegisterReply | pb.HeartbeatReply) -> Lease:
    return Lease(
        lease_ns=reply.lease_ms * MS,
        heartbeat_ns=reply.heartbeat_ms * MS,
        version=RoutingVersion(reply.routing_version),
        identity=reply.identity,
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
