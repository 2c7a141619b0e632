"""Whatever happens in whatever order: counters equal the tree, and no limit is passed."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from emberfs.meta import batch
from emberfs.meta.schema import QuotaState
from emberfs.proto import batch_calls
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import ROOT_INODE
from unit.meta_world import ROOT, World
from unit.quota_world import check_counters, check_tree, listed, remove_quota, set_quota, walked

DIRECTORIES = ("", "/a", "/b", "/a/c", "/a/c/d", "/b/c")
NAMES = ("a", "b", "c", "d", "x", "y")
PATHS = st.tuples(st.sampled_from(DIRECTORIES), st.sampled_from(NAMES))
# What a file system may answer to a random call; nothing else.
ANSWERS = {
    Code.NOT_FOUND,
    Code.EXISTS,
    Code.NOT_DIRECTORY,
    Code.IS_DIRECTORY,
    Code.NOT_EMPTY,
    Code.INVALID,
    Code.NOT_PERMITTED,
    Code.QUOTA,
    Code.OTHER_QUOTA,
}


class QuotaMachine(RuleBasedStateMachine):
    """Names, lengths, open files, quotas and restarts at random."""

    inline_bytes_max = 0

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = World(inline_bytes_max=self.inline_bytes_max)
        self.sessions: dict[int, int] = {}  # session -> inode
        self.run(self.world.open())

    def teardown(self) -> None:
        self.run(self._end())
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    async def _end(self) -> None:
        for session, inode in self.sessions.items():
            await self.world.settle(inode, session, close=True)
        await walked(self.world)
        await check_counters(self.world)
        check_tree(self.world)
        self.world.check()

    def attempt(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            self.run(work)
        except EmberfsError as problem:
            if problem.code not in ANSWERS:
                raise

    async def at(self, directory: str) -> Inode:
        return (await self.world.walk(directory.encode() or b"/")).inode

    # ------------------------------------------------------------ names and lengths

    @rule(path=PATHS, directory=st.booleans())
    def make(self, path: tuple[str, str], directory: bool) -> None:
        async def work() -> None:
            place, name = (await self.at(path[0])).id, path[1].encode()
            await (self.world.mkdir(name, place) if directory else self.world.file(name, place))

        self.attempt(work())

    @rule(
        files=st.lists(st.tuples(PATHS, st.integers(0, 120)), max_size=5), exclusive=st.booleans()
    )
    def make_many(self, files: list[tuple[tuple[str, str], int]], exclusive: bool) -> None:
        items = tuple(
            batch_calls.BatchItem("/".join(path).encode(), bytes(length)) for path, length in files
        )
        request = batch_calls.BatchCreateRequest(
            ROOT, self.world.rid(), items, 0o644, exclusive=exclusive
        )
        answer = self.run(batch.create(self.world.context, request))
        allowed = {batch_calls.DONE, batch_calls.ORDINARY, *ANSWERS}
        assert {outcome.code for outcome in answer.outcomes} <= allowed

    @rule(path=PATHS, truncate=st.booleans())
    def open(self, path: tuple[str, str], truncate: bool) -> None:
        async def work() -> None:
            session = len(self.sessions) + 1
            while session in self.sessions:
                session += 1
            place = await self.at(path[0])
            found = await self.world.create(
                path[1].encode(), place.id, session=session, truncate=truncate
            )
            self.sessions[session] = found.id

        self.attempt(work())

    @rule(data=st.data(), length=st.integers(0, 300), close=st.booleans())
    def settle(self, data: st.DataObject, length: int, close: bool) -> None:
        if not self.sessions:
            return
        session = data.draw(st.sampled_from(sorted(self.sessions)))
        inode = self.sessions[session]

        async def work() -> None:
            found = await self.world.getattr(inode)
            version = found.truncate_version
            await self.world.settle(
                inode, session, length=length, truncate_version=version, close=close
            )
            if close:
                del self.sessions[session]

        self.attempt(work())

    @rule(path=PATHS, length=st.integers(0, 300))
    def truncate(self, path: tuple[str, str], length: int) -> None:
        async def work() -> None:
            found = await self.world.lookup(path[1].encode(), (await self.at(path[0])).id)
            await self.world.setattr(found.id, length=length)

        self.attempt(work())

    @rule(source=PATHS, to=PATHS, flags=st.sampled_from((0, 0, 0, 2)))
    def rename(self, source: tuple[str, str], to: tuple[str, str], flags: int) -> None:
        async def work() -> None:
            old, new = (await self.at(source[0])).id, (await self.at(to[0])).id
            names = source[1].encode(), to[1].encode()
            await self.world.rename(*names, old, new, flags)

        self.attempt(work())

    @rule(source=PATHS, to=PATHS)
    def link(self, source: tuple[str, str], to: tuple[str, str]) -> None:
        async def work() -> None:
            found = await self.world.lookup(source[1].encode(), (await self.at(source[0])).id)
            await self.world.link(found.id, to[1].encode(), (await self.at(to[0])).id)

        self.attempt(work())

    @rule(path=PATHS, directory=st.booleans())
    def remove(self, path: tuple[str, str], directory: bool) -> None:
        async def work() -> None:
            place, name = (await self.at(path[0])).id, path[1].encode()
            await (self.world.rmdir(name, place) if directory else self.world.unlink(name, place))

        self.attempt(work())

    # ------------------------------------------------------------ quotas

    @rule(
        place=st.sampled_from(DIRECTORIES),
        files=st.integers(0, 6),
        length=st.integers(0, 500),
    )
    def set(self, place: str, files: int, length: int) -> None:
        async def work() -> None:
            found = await self.at(place)
            await set_quota(self.world, found.id, files_max=files, bytes_max=length)

        self.attempt(work())

    @rule(place=st.sampled_from(DIRECTORIES))
    def lift(self, place: str) -> None:
        async def work() -> None:
            await remove_quota(self.world, (await self.at(place)).id)

        self.attempt(work())

    @rule(steps=st.integers(1, 3))
    def count(self, steps: int) -> None:
        async def work() -> None:
            for _ in range(steps):
                await self.world.context.quota_walks.step()

        self.run(work())

    @rule()
    def restart(self) -> None:
        async def work() -> None:
            await self.world.context.close()
            self.world.boot()
            await self.world.context.load()

        self.run(work())

    @invariant()
    def counters_are_the_sums(self) -> None:
        self.run(check_counters(self.world))


QuotaMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestQuotas = QuotaMachine.TestCase


class SmallFilesMachine(QuotaMachine):
    """The same with files beside their inodes, which batches make."""

    inline_bytes_max = 100


SmallFilesMachine.TestCase.settings = QuotaMachine.TestCase.settings
TestQuotasOfSmallFiles = SmallFilesMachine.TestCase


def test_limits_hold_for_many_at_once() -> None:
    """Adds do not conflict; near the limit they must not both pass it."""

    async def scene() -> None:
        world = World()
        await world.open()
        top = await world.mkdir(b"top")
        await set_quota(world, top.id, files_max=50)
        await walked(world)

        async def make(number: int) -> bool:
            try:
                await world.file(b"%d" % number, top.id)
            except EmberfsError as problem:
                if problem.code != Code.QUOTA:
                    raise
                return False
            return True

        made = await asyncio.gather(*(make(number) for number in range(80)))
        assert sum(made) == 49
        [report] = await listed(world)
        assert report.files_used == 50
        assert report.state == QuotaState.ACTIVE.name.lower()
        assert report.directory != ROOT_INODE
        await world.close()

    asyncio.run(scene())
