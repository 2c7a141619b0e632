"""A client that caches hears of changes, and knows when it does not."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from emberfs.client import listening
from emberfs.client.listening import Listening
from emberfs.fabric.call import ServerCall
from emberfs.fabric.pool import PeerPool
from emberfs.meta.announce import Announcer
from emberfs.proto.cluster import NodeKind
from emberfs.proto.ids import MS
from emberfs.proto.meta_calls import LISTEN, Change
from emberfs.runtime.real import RealEnv
from unit.client_fakes import META_NODE, FakeNode, FakeRouting

ENTRY = b"D" + bytes(7) + b"\x01" + b"a"
CHANGE = Change(1, b"a")  # type: ignore[arg-type]


class Speaker(FakeNode):
    """A metadata server that has nothing but news."""

    def __init__(self, env: RealEnv, number: int) -> None:
        super().__init__(env, number, NodeKind.META)
        self.announcer = Announcer(env)
        self.handlers = {LISTEN.number: self.listen}

    async def listen(self, call: ServerCall) -> bytes:
        answer = await self.announcer.listen(LISTEN.decode_request(call.body))
        return LISTEN.encode_answer(answer)


class Notes:
    """Who caches."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.losses = 0

    def heard(self, changes: Sequence[Change]) -> None:
        self.changes += changes

    def lost(self) -> None:
        self.losses += 1


class Lease:
    good = True

    def lease_ok(self) -> bool:
        return self.good


class Stage:
    """Two servers and a client."""

    def __init__(self) -> None:
        self.env = RealEnv()
        self.routing = FakeRouting()
        self.speakers = [Speaker(self.env, META_NODE), Speaker(self.env, META_NODE + 1)]
        self.notes, self.lease = Notes(), Lease()

    async def play(self, script: "Callable[[Stage], object]") -> None:
        peers = PeerPool(self.env)
        self.ears = Listening(self.env, self.routing, peers, 7, self.lease)
        for speaker in self.speakers:
            await speaker.start()
        self.publish()
        self.ears.start(self.notes)
        try:
            await self.until(self.ears.is_current)
            await script(self)  # type: ignore[misc]
        finally:
            await self.ears.close()
            await peers.close()
            for speaker in self.speakers:
                await speaker.stop()

    def publish(self) -> None:
        self.routing.publish({speaker.id: speaker.record() for speaker in self.speakers})

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)


def play(script: Callable[[Stage], object]) -> None:
    asyncio.run(asyncio.wait_for(Stage().play(script), 20))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, ms in (("HOLD_NS", 50), ("HEARD_NS", 300), ("LOOK_NS", 20), ("PAUSE_NS", 10)):
        monkeypatch.setattr(listening, name, ms * MS)


def test_changes_of_every_server_are_heard() -> None:
    async def script(stage: Stage) -> None:
        for count, speaker in enumerate(stage.speakers, 1):
            speaker.announcer.note([ENTRY], 0)
            await stage.until(lambda count=count: stage.notes.changes == [CHANGE] * count)
        assert stage.ears.is_current()

    play(script)


def test_a_server_that_hangs_makes_it_forget_until_it_is_heard_again() -> None:
    async def script(stage: Stage) -> None:
        losses, silent = stage.notes.losses, stage.speakers[1]
        silent.hang = True
        await stage.until(lambda: not stage.ears.is_current())
        assert stage.notes.losses == losses + 1
        silent.hang = False
        await stage.until(stage.ears.is_current)

    play(script)


def test_a_server_that_dies_takes_news_with_it() -> None:
    async def script(stage: Stage) -> None:
        losses, dead = stage.notes.losses, stage.speakers.pop()
        stage.publish()
        assert not stage.ears.is_current()
        assert stage.notes.losses == losses + 1
        await stage.until(stage.ears.is_current)
        await dead.stop()

    play(script)


def test_a_server_in_a_new_life_may_have_done_anything_before() -> None:
    async def script(stage: Stage) -> None:
        losses = stage.notes.losses
        stage.speakers[0].announcer = Announcer(stage.env)
        await stage.until(lambda: stage.notes.losses > losses)
        await stage.until(stage.ears.is_current)

    play(script)


def test_without_a_lease_there_may_be_servers_that_nobody_listens_to() -> None:
    async def script(stage: Stage) -> None:
        losses = stage.notes.losses
        stage.lease.good = False
        assert not stage.ears.is_current()
        assert stage.notes.losses == losses + 1
        stage.lease.good = True
        await stage.until(stage.ears.is_current)

    play(script)
