"""A routing stream from a mgmtd that does not lead any more is given up, a slow one is not."""

import asyncio
from collections.abc import AsyncGenerator

from emberfs.client.routing import Routing
from emberfs.proto.cluster import RoutingSnapshot
from emberfs.proto.ids import SECOND, RoutingVersion
from emberfs.runtime.real import RealEnv


def snapshot(version: int) -> RoutingSnapshot:
    return RoutingSnapshot("c", RoutingVersion(version), {}, {}, {}, identity=1)


class TwoManagers:
    """The first stream brings version 1 and then nothing, as from a frozen process."""

    def __init__(self, *, watches_another: bool) -> None:
        self.streams = 0
        self.watches_another = watches_another

    async def watch(self, have_version: RoutingVersion) -> AsyncGenerator[RoutingSnapshot, None]:
        self.streams += 1
        yield snapshot(self.streams)
        await asyncio.Event().wait()


async def followed(expected: int, *, another: bool = True) -> tuple[int, int]:
    """Return the version and the number of streams some time after a heartbeat's answer."""
    source = TwoManagers(watches_another=another)
    routing = Routing(RealEnv(), source)
    await routing.start(SECOND)
    for _ in range(3):
        routing.expect(RoutingVersion(expected))
    await routing.wait_newer(RoutingVersion(1), SECOND // 2)
    found = routing.snapshot.version, source.streams
    await routing.close()
    return found


def test_a_stream_that_is_behind_is_replaced_once() -> None:
    assert asyncio.run(followed(2)) == (2, 2)


def test_a_stream_that_is_up_to_date_stays() -> None:
    assert asyncio.run(followed(1)) == (1, 1)


def test_a_slow_stream_from_the_mgmtd_that_answers_is_waited_for() -> None:
    """A large snapshot on a slow link would be cut off again with every heartbeat."""
    assert asyncio.run(followed(2, another=False)) == (1, 1)
