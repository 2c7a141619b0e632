"""Messages of the control plane: any protobuf becomes an event or MALFORMED; mgmtd survives all.

mgmtd stops answering when its machine raises (manager.py), so no message may make it raise.
"""

from typing import Any

from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from emberfs.mgmtd.events import (
    ChainsRequested,
    Event,
    HeartbeatArrived,
    Loaded,
    Publish,
    Registered,
    Ticked,
    Timing,
)
from emberfs.mgmtd.membership import Membership
from emberfs.proto import control_pb2 as pb
from emberfs.proto.cluster import Node, NodeKind, RoutingSnapshot
from emberfs.proto.control_wire import (
    kind_from_wire,
    node_from_wire,
    reports_from_wire,
    routing_from_wire,
    routing_to_wire,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND, ChainId, NodeId, TargetId
from fuzz.profile import budget
from fuzz.strategies import U32, U63, U64, damaged

NODES = st.sampled_from((11, 12)) | U32
TARGETS = st.sampled_from((1101, 1102, 1201, 1202)) | U32


def scalars(field: Any) -> st.SearchStrategy[Any]:
    if field.name in ("target", "targets") and field.type == field.TYPE_UINT32:
        return TARGETS
    if field.name in ("node", "id") and field.type == field.TYPE_UINT32:
        return NODES
    known = {
        field.TYPE_UINT32: U32,
        field.TYPE_UINT64: st.sampled_from((1, 2)) | U64,
        field.TYPE_INT64: U63,
        field.TYPE_STRING: st.text(max_size=10),
        field.TYPE_BYTES: st.binary(max_size=10),
        field.TYPE_BOOL: st.booleans(),
    }
    if field.type == field.TYPE_ENUM:
        numbers = [value.number for value in field.enum_type.values]
        return st.sampled_from(numbers) | st.sampled_from((77, -1))
    return known[field.type]


def fill(draw: Any, message: Message) -> Any:
    """Set most fields of a message, whatever its type has."""
    for field in message.DESCRIPTOR.fields:
        if draw(st.integers(0, 9)) == 0:
            continue
        for _ in range(draw(st.integers(0, 2)) if field.is_repeated else 1):
            place = getattr(message, field.name)
            if field.message_type:
                fill(draw, place.add() if field.is_repeated else place)
                if not field.is_repeated:
                    place.SetInParent()
            elif field.is_repeated:
                place.append(draw(scalars(field)))
            else:
                setattr(message, field.name, draw(scalars(field)))
    return message


@st.composite
def messages(draw: Any, kind: type[Any]) -> Any:
    return fill(draw, kind())


def event_of(message: Any) -> Event:
    """As mgmtd/server.py translates."""
    match message:
        case pb.RegisterRequest():
            return Registered(node_from_wire(message.node), reports_from_wire(message.targets))
        case pb.HeartbeatRequest():
            return HeartbeatArrived(
                NodeId(message.node),
                kind_from_wire(message.kind),
                message.incarnation,
                reports_from_wire(message.targets),
            )
        case pb.CreateChainsRequest():
            chains = message.chains
            return ChainsRequested(
                tuple((ChainId(c.id), tuple(map(TargetId, c.targets))) for c in chains)
            )
    return Ticked()


ASKED = st.one_of(
    st.none(), *map(messages, (pb.RegisterRequest, pb.HeartbeatRequest, pb.CreateChainsRequest))
)


@budget(150)
@given(st.lists(st.tuples(ASKED, st.sampled_from((0, SECOND // 10, 3 * SECOND))), max_size=25))
def test_o23_no_control_message_stops_mgmtd(story: list[tuple[Any, int]]) -> None:
    """Whatever processes send, mgmtd goes on, stays consistent, and publishes what can be read."""
    own = Node(NodeId(1), NodeKind.MGMTD, "h", (), 1, alive=True)
    machine = Membership("c", own, Timing(SECOND, SECOND // 10))
    now_ns = 0
    machine.handle(Loaded(), now_ns)
    for message, passed_ns in story:
        now_ns += passed_ns
        try:
            event = event_of(message)
        except EmberfsError as problem:
            code = problem.code
        else:
            code = Code.MALFORMED
            for effect in machine.handle(event, now_ns):
                if isinstance(effect, Publish):
                    assert routing_from_wire(routing_to_wire(effect.snapshot)) == effect.snapshot
        assert code is Code.MALFORMED
        machine.check()


@budget(200)
@given(damaged(messages(pb.Routing).map(lambda m: m.SerializeToString())))
def test_o23_any_routing_message_is_a_snapshot_or_malformed(raw: bytes) -> None:
    """A client that hears nonsense from mgmtd gets MALFORMED, nothing else."""
    try:
        message = pb.Routing.FromString(raw)
    except DecodeError:  # gRPC answers that itself
        return
    try:
        found = routing_from_wire(message)
    except EmberfsError as problem:
        code = problem.code
    else:
        assert isinstance(found, RoutingSnapshot)
        return
    assert code is Code.MALFORMED
