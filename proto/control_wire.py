"""Conversions between the protobuf messages of the control plane and the structs of cluster.py.

Numbers out of range and unknown enum values from outside raise EmberfsError(MALFORMED).
"""

from collections.abc import Iterable

from emberfs.proto import control_pb2 as pb
from emberfs.proto.cluster import (
    Chain,
    ChainTarget,
    LocalState,
    Node,
    NodeKind,
    PublicState,
    RoutingSnapshot,
    TargetReport,
    TargetStatus,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ChainId, ChainVersion, NodeId, RoutingVersion, TargetId

CODE_METADATA = "emberfs-code"  # trailing metadata: the number of proto/errors.py


def node_to_wire(node: Node) -> pb.Node:
    """Return the message of a node."""
    return pb.Node(
        id=node.id,
        kind=pb.NodeKind.ValueType(node.kind),
        host=node.host,
        endpoints=node.endpoints,
        incarnation=node.incarnation,
        alive=node.alive,
        metrics=node.metrics,
        client=node.client,
    )


def node_from_wire(message: pb.Node) -> Node:
    """Return the node of a message."""
    return Node(
        id=NodeId(message.id),
        kind=kind_from_wire(message.kind),
        host=message.host,
        endpoints=tuple(message.endpoints),
        incarnation=message.incarnation,
        alive=message.alive,
        metrics=message.metrics,
        client=message.client,
    )


def kind_from_wire(number: int) -> NodeKind:
    """Return a node kind."""
    try:
        return NodeKind(number)
    except ValueError:
        raise EmberfsError(Code.MALFORMED, f"unknown kind of node: {number}") from None


def report_to_wire(report: TargetReport) -> pb.TargetReport:
    """Return the message of a report."""
    return pb.TargetReport(
        target=report.target,
        local=pb.LocalState.ValueType(report.local),
        chain_version=report.chain_version,
        used_bytes=report.used_bytes,
        capacity_bytes=report.capacity_bytes,
        reason=report.reason,
        sync_done_bytes=report.sync_done_bytes,
        sync_total_bytes=report.sync_total_bytes,
        sync_done_chunks=report.sync_done_chunks,
        sync_total_chunks=report.sync_total_chunks,
        sync_bytes_per_s=report.sync_bytes_per_s,
        sync_source=report.sync_source,
        sync_problem=report.sync_problem,
        damaged_chunks=report.damaged_chunks,
        scrub_percent=report.scrub_percent,
        scrub_finished_s=report.scrub_finished_s,
        scrub_findings=report.scrub_findings,
        unreachable=report.unreachable,
        doubtful=report.doubtful,
    )


def reports_from_wire(messages: Iterable[pb.TargetReport]) -> tuple[TargetReport, ...]:
    """Return the reports of messages."""
    return tuple(report_from_wire(message) for message in messages)


def report_from_wire(message: pb.TargetReport) -> TargetReport:
    """Return the report of a message."""
    try:
        local = LocalState(message.local)
    except ValueError:
        raise EmberfsError(Code.MALFORMED, f"unknown local state: {message.local}") from None
    return TargetReport(
        target=TargetId(message.target),
        local=local,
        chain_version=ChainVersion(message.chain_version),
        used_bytes=message.used_bytes,
        capacity_bytes=message.capacity_bytes,
        reason=message.reason,
        sync_done_bytes=message.sync_done_bytes,
        sync_total_bytes=message.sync_total_bytes,
        sync_done_chunks=message.sync_done_chunks,
        sync_total_chunks=message.sync_total_chunks,
        sync_bytes_per_s=message.sync_bytes_per_s,
        sync_source=TargetId(message.sync_source),
        sync_problem=message.sync_problem,
        damaged_chunks=message.damaged_chunks,
        scrub_percent=message.scrub_percent,
        scrub_finished_s=message.scrub_finished_s,
        scrub_findings=message.scrub_findings,
        unreachable=tuple(TargetId(number) for number in message.unreachable),
        doubtful=message.doubtful,
    )


def _public_from_wire(number: int) -> PublicState:
    try:
        return PublicState(number)
    except ValueError:
        raise EmberfsError(Code.MALFORMED, f"unknown public state: {number}") from None


def _chain_to_wire(chain: Chain) -> pb.Chain:
    return pb.Chain(
        id=chain.id,
        version=chain.version,
        targets=[
            pb.ChainTarget(
                target=place.target,
                node=place.node,
                state=pb.PublicState.ValueType(place.state),
            )
            for place in chain.targets
        ],
        lost=chain.lost,
    )


def _chain_from_wire(message: pb.Chain) -> Chain:
    return Chain(
        id=ChainId(message.id),
        version=ChainVersion(message.version),
        targets=tuple(
            ChainTarget(TargetId(place.target), NodeId(place.node), _public_from_wire(place.state))
            for place in message.targets
        ),
        lost=ChainVersion(message.lost),
    )


def _status_to_wire(status: TargetStatus) -> pb.TargetStatus:
    return pb.TargetStatus(
        target=status.target,
        node=status.node,
        chain=status.chain,
        public=pb.PublicState.ValueType(status.public),
        report=report_to_wire(status.report),
        unwanted=status.unwanted,
    )


def _status_from_wire(message: pb.TargetStatus) -> TargetStatus:
    return TargetStatus(
        target=TargetId(message.target),
        node=NodeId(message.node),
        chain=ChainId(message.chain),
        public=_public_from_wire(message.public),
        report=report_from_wire(message.report),
        unwanted=message.unwanted,
    )


def routing_to_wire(snapshot: RoutingSnapshot) -> pb.Routing:
    """Return the message of a snapshot."""
    return pb.Routing(
        cluster=snapshot.cluster,
        version=snapshot.version,
        nodes=map(node_to_wire, snapshot.nodes.values()),
        chains=map(_chain_to_wire, snapshot.chains.values()),
        targets=map(_status_to_wire, snapshot.targets.values()),
        identity=snapshot.identity,
    )


def routing_from_wire(message: pb.Routing) -> RoutingSnapshot:
    """Return the snapshot of a message."""
    return RoutingSnapshot(
        cluster=message.cluster,
        version=RoutingVersion(message.version),
        nodes={NodeId(m.id): node_from_wire(m) for m in message.nodes},
        chains={ChainId(m.id): _chain_from_wire(m) for m in message.chains},
        targets={TargetId(m.target): _status_from_wire(m) for m in message.targets},
        identity=message.identity,
    )
