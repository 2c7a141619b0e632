"""Which metadata server is asked: spread, lengths of a file at one, failover, and back again."""

from collections import Counter

import msgspec
import pytest

from emberfs.client.metachoice import MetaServers, file_of
from emberfs.proto import meta_calls as calls
from emberfs.proto.cluster import Node, NodeKind, RoutingSnapshot
from emberfs.proto.ids import SECOND, InodeId, NodeId, RoutingVersion, SessionId
from emberfs.proto.rendezvous import home_of
from unit.meta_world import TestEnv

WHO = calls.Caller(0, 0)
ID = calls.RequestId(7, 1)
FILE = InodeId(5)


def routing(*nodes: int, dead: tuple[int, ...] = (), incarnation: int = 1) -> RoutingSnapshot:
    found = {
        NodeId(n): Node(
            NodeId(n), NodeKind.META, "h", (f"tcp://h:{n}",), incarnation, alive=n not in dead
        )
        for n in nodes
    }
    return RoutingSnapshot("c", RoutingVersion(1), found, {}, {})


def test_clients_and_files_are_spread_evenly_and_stay_where_they_are() -> None:
    """When a server goes, only its own keys move, and evenly."""
    before = {key: home_of(key, [2, 3, 4, 5]) for key in range(4000)}
    counts = Counter(before.values())
    assert max(counts.values()) < 1.15 * min(counts.values())
    after = {key: home_of(key, [2, 3, 5]) for key in before}
    assert all(after[key] == node for key, node in before.items() if node != 4)
    moved = Counter(after[key] for key, node in before.items() if node == 4)
    assert max(moved.values()) < 1.3 * min(moved.values())


@pytest.mark.parametrize(
    ("request_", "inode"),
    [
        (calls.SettleRequest(ID, FILE, SessionId(1)), FILE),
        (calls.SetattrRequest(WHO, ID, FILE, length=3), FILE),
        (calls.SetattrRequest(WHO, ID, FILE, mode=0o600), None),
        (calls.OpenRequest(WHO, ID, FILE, SessionId(1), read=True, write=True), FILE),
        (calls.OpenRequest(WHO, ID, FILE, SessionId(1), read=True, write=False), None),
        (calls.GetattrRequest(FILE), None),
    ],
)
def test_what_changes_a_length_goes_to_the_server_of_the_file(
    request_: msgspec.Struct, inode: int | None
) -> None:
    assert file_of(request_) == inode


def test_a_server_that_fails_is_left_and_found_again() -> None:
    env = TestEnv()
    servers, now = MetaServers(env, 7), routing(2, 3, 4)
    home = servers.choose(now)
    assert home == home_of(7, [2, 3, 4])
    assert servers.choose(now, 99) == home_of(99, [2, 3, 4])
    servers.failed(now, home)
    other = servers.choose(now)
    assert other not in (home, None)
    env.skipped_ns += 2 * SECOND
    assert servers.choose(now) == home  # one call looks
    assert servers.choose(now) == other  # the others wait for what it finds
    servers.failed(now, home)
    env.skipped_ns += SECOND // 2
    assert servers.choose(now) == other
    servers.answered(home)
    assert servers.choose(now) == home


def test_news_of_a_server_end_its_exile() -> None:
    env = TestEnv()
    servers, now = MetaServers(env, 7), routing(2, 3)
    home = servers.choose(now)
    assert home is not None
    servers.failed(now, home)
    assert servers.choose(now) != home
    assert servers.choose(routing(2, 3, incarnation=2)) == home
    assert servers.choose(routing(2, 3, dead=(home,))) != home


def test_somebody_is_always_asked() -> None:
    """The only server, or the last of several that all fail, and one that is thought dead."""
    env = TestEnv()
    servers = MetaServers(env, 7)
    assert servers.choose(routing()) is None
    assert servers.choose(routing(2, dead=(2,))) == 2
    now = routing(2, 3)
    for node in (2, 3):
        servers.failed(now, NodeId(node))
    assert servers.choose(now) in (2, 3)
    assert servers.choose(now, but=(NodeId(2),)) == 3
    assert servers.choose(now, but=(NodeId(2), NodeId(3))) in (2, 3)
