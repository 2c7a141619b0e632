"""A server announces what it has committed: to others everything, to who did it what it lacks."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from emberfs.meta import announce, files
from emberfs.meta.announce import Announced, Announcer
from emberfs.proto import meta_calls as calls
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, ROOT_INODE, SECOND
from emberfs.proto.meta_calls import Change
from unit.meta_world import CLIENT, World

OTHER = CLIENT + 1


class Ear:
    """One client that listens to a server."""

    def __init__(self, world: World, client: int = OTHER) -> None:
        self.world = world
        self.client = client
        self.life = self.after = 0

    async def listen(self, hold_ns: int = 0) -> calls.ListenAnswer:
        request = calls.ListenRequest(self.client, self.life, self.after, hold_ns)
        answer = await self.world.context.announcer.listen(request)
        self.life, self.after = answer.life, answer.last
        return answer

    async def changes(self) -> set[Change]:
        answer = await self.listen()
        assert not answer.missed
        return set(answer.changes)


def story(work: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        world = World()
        announcer = Announcer(world.env)
        world.engine = Announced(world.engine, announcer)  # type: ignore[assignment]
        world.context.engine = world.engine
        world.context.replies._engine = world.engine
        world.context.announcer = announcer
        await world.open()
        await work(world)
        await world.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_names_and_attributes_are_announced() -> None:
    async def work(world: World) -> None:
        ear = Ear(world)
        assert (await ear.listen()).missed  # the first answer says where to begin
        made = await world.file(b"a")
        assert await ear.changes() >= {
            Change(ROOT_INODE, b"a"),
            Change(ROOT_INODE),
            Change(made.id),
        }
        await world.rename(b"a", b"b")
        assert await ear.changes() >= {Change(ROOT_INODE, b"a"), Change(ROOT_INODE, b"b")}
        await world.lookup(b"b")
        assert await ear.changes() == set()
        await world.unlink(b"b")
        assert Change(ROOT_INODE, b"b") in await ear.changes()

    story(work)


def test_who_did_it_is_told_only_what_its_own_answer_does_not_say() -> None:
    async def work(world: World) -> None:
        ear = Ear(world, CLIENT)
        await ear.listen()
        made = await world.create(b"a")
        assert await ear.changes() == set()
        request = calls.SettleRequest(world.rid(), made.id, 1, length=5)  # type: ignore[arg-type]
        await files.settle(world.context, request)
        assert await ear.changes() == {Change(made.id)}

    story(work)


def test_an_answer_is_held_until_something_happens() -> None:
    async def work(world: World) -> None:
        ear = Ear(world)
        await ear.listen()
        waiting = asyncio.ensure_future(ear.listen(SECOND))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await world.file(b"a")
        assert (await waiting).changes
        assert not (await ear.listen(MS)).changes

    story(work)


def test_who_lags_too_far_behind_has_missed_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announce, "KEPT_MAX", 4)

    async def work(world: World) -> None:
        ear = Ear(world)
        await ear.listen()
        for n in range(3):
            await world.file(b"%d" % n)
        assert (await ear.listen()).missed
        await world.lookup(b"0")
        assert await ear.changes() == set()

    story(work)


def test_many_changes_come_in_several_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announce, "ANSWER_MAX", 2)

    async def work(world: World) -> None:
        ear = Ear(world)
        await ear.listen()
        for n in range(4):
            await world.file(b"%d" % n)
        found = set()
        while some := await ear.changes():
            found |= some
        assert {Change(ROOT_INODE, b"%d" % n) for n in range(4)} <= found

    story(work)


def test_a_commit_of_unknown_outcome_is_announced() -> None:
    class Forgetful:
        conflicts = 0
        sync = close = begin = watch = None

        async def run(self, work: object, **_: object) -> None:
            class Written:
                written_keys = (b"D" + bytes(7) + b"\x01" + b"a",)
                origin = CLIENT

            await work(Written())  # type: ignore[operator]
            raise EmberfsError(Code.MAYBE_COMMITTED, "no answer")

    async def run() -> None:
        announcer = Announcer(World().env)
        engine = Announced(Forgetful(), announcer)  # type: ignore[arg-type]

        async def work(_: object) -> None:
            pass

        with pytest.raises(EmberfsError):
            await engine.run(work)
        request = calls.ListenRequest(CLIENT, announcer.life, 0, 0)
        assert (await announcer.listen(request)).changes == (Change(ROOT_INODE, b"a"),)

    asyncio.run(run())


def test_a_commit_whose_caller_is_cancelled_is_announced() -> None:
    """The connection of a writer breaks while its settlement waits for stable storage."""

    async def work(world: World) -> None:
        ear = Ear(world)
        await ear.listen()
        made = await world.create(b"a")
        await ear.changes()
        syncs = asyncio.Event()

        async def forever() -> None:
            syncs.set()
            await asyncio.Event().wait()

        local = world.engine._engine  # type: ignore[attr-defined]
        local.sync, whole = forever, local.sync
        request = calls.SettleRequest(world.rid(), made.id, 1, length=5, durable=True)  # type: ignore[arg-type]
        settling = asyncio.ensure_future(files.settle(world.context, request))
        await syncs.wait()
        settling.cancel()
        await asyncio.gather(settling, return_exceptions=True)
        local.sync = whole
        assert Change(made.id) in await ear.changes()

    story(work)
