"""Batches through the library: the real meta with deaths, and a fake one behind a real network."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from emberfs.client import batch, blocking
from emberfs.client.file import FileSystem
from emberfs.client.oserrors import FileSystemError
from emberfs.proto import batch_calls as bc
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import INLINE_BYTES_MAX
from emberfs.proto.meta_calls import Caller
from unit.client_fakes import World, run
from unit.model_world import FATES, ModelWorld
from unit.test_client_file import system

LIMIT = 8192
ROOT, USER = Caller(0, 0), Caller(1000, 1000)

Fake = Callable[[World, FileSystem], Awaitable[None]]


def play(scene: Callable[[ModelWorld, FileSystem], Awaitable[None]]) -> None:
    """The real meta, called through its handlers."""

    async def main() -> None:
        async with asyncio.timeout(20):
            real = ModelWorld()
            real.keep_small_files(LIMIT)
            await real.open()
            await scene(real, real.library(0, ROOT, 0o022))
            await real.close()

    asyncio.run(main())


def play_fake(scene: Fake) -> None:
    async def test(world: World) -> None:
        world.meta.inline_bytes_max = 1000
        await scene(world, system(world))

    run(test)


async def read(fs: FileSystem, path: str) -> bytes:
    async with await fs.open(path) as file:
        return await file.read()


def codes(results: list[Any]) -> list[Any]:
    return [one.code if isinstance(one, FileSystemError) else one for one in results]


def test_many_files_are_made_and_looked_at() -> None:
    async def scene(real: ModelWorld, fs: FileSystem) -> None:
        await fs.mkdir("/d")
        items = [(f"/d/{n}", b"content %d" % n) for n in range(600)]
        assert await fs.batch_create(items) == [None] * 600
        found = await fs.batch_stat([path for path, _ in items])
        assert [
            (one.st_size, oct(one.st_mode)) for one in found if isinstance(one, os.stat_result)
        ] == [(len(data), "0o100644") for _, data in items]
        assert found[7] == await fs.stat("/d/7")
        for path, data in items[::97]:
            assert await read(fs, path) == data
        assert await fs.batch_create([]) == []
        assert await fs.batch_stat([]) == []

    play(scene)


def test_missing_files_are_none_and_other_errors_are_told() -> None:
    async def scene(real: ModelWorld, fs: FileSystem) -> None:
        await fs.mkdir("/closed", 0o700)
        await fs.batch_create([("/a", b"12"), ("/closed/a", b"")])
        await fs.symlink("a", "/way")
        await fs.symlink("loop", "/loop")
        theirs = real.library(1, USER, 0)
        asked = ["/a", "/none", "/a/x", "/closed/a", "/loop", "/" + "x" * 300, "/way", "/y" * 9000]
        found = await theirs.batch_stat(asked)
        wanted = [Code.ACCESS, Code.LOOP, Code.NAME_TOO_LONG]
        assert codes(found)[1:6] == [None, None, *wanted]
        assert found[0] == found[6] == await fs.stat("/a")
        assert codes(found)[7] == Code.NAME_TOO_LONG
        assert isinstance(found[3], PermissionError)
        assert found[3].filename == "/closed/a"
        unfollowed = await fs.batch_stat(["/way"], follow_symlinks=False)
        assert unfollowed == [await fs.stat("/way", follow_symlinks=False)]
        made = await theirs.batch_create([("/closed/b", b""), ("/a", b""), ("/n/n", b"")])
        assert codes(made) == [Code.ACCESS, Code.ACCESS, Code.NOT_FOUND]
        assert isinstance(made[2], FileNotFoundError)

    play(scene)


@pytest.mark.parametrize(
    "fates", [(one,) for one in FATES] + [("die after", "die after", "repeat")]
)
def test_c9_a_batch_over_deaths_of_the_server_happens_once(fates: tuple[str, ...]) -> None:
    """The answer is lost, the server dies before or behind it: every file once, no false error."""

    async def scene(real: ModelWorld, fs: FileSystem) -> None:
        await fs.mkdir("/d")
        items = [(f"/d/{n}", b"%d" % n) for n in range(100)]
        real.server.fates.extend(fates)
        made = await fs.batch_create([*items, ("/none/x", b"")], exclusive=True)
        assert codes(made) == [None] * 100 + [Code.NOT_FOUND]
        assert not real.server.fates
        assert len(await fs.listdir("/d")) == 100
        again = await fs.batch_create(items, exclusive=True)
        assert all(isinstance(one, FileExistsError) for one in again)
        real.server.fates.extend(fates)
        assert None not in await fs.batch_stat([path for path, _ in items])
        for path, data in items[::33]:
            assert await read(fs, path) == data

    play(scene)


def test_an_open_file_of_the_same_client_sees_what_replaces_it() -> None:
    async def scene(real: ModelWorld, fs: FileSystem) -> None:
        file = await fs.open("/f", "w+")
        await file.write(b"own, and not settled")
        assert await fs.batch_create([("/f", b"new"), ("/g", b"")]) == [None, None]
        await file.seek(0)
        assert await file.read() == b"new"
        await file.close()
        assert await read(fs, "/f") == b"new"
        assert await fs.batch_create([("/f", b"newer")]) == [None]
        assert await read(fs, "/f") == b"newer"

    play(scene)


def test_what_another_client_has_open_is_replaced_under_it() -> None:
    async def scene(real: ModelWorld, fs: FileSystem) -> None:
        await fs.batch_create([("/f", b"0123456789")])
        other = await real.library(1, ROOT, 0).open("/f", "r+")
        await other.pwrite(b"XY", 5)
        assert await fs.batch_create([("/f", b"abc")]) == [None]
        await other.close()
        assert await read(fs, "/f") == b"abc\0\0XY"

    play(scene)


# ---------------------------------------------------------------- over the network


def test_c9_a_batch_whose_reply_was_lost_is_retried_with_the_same_request_id() -> None:
    """The second try is answered as the first one was."""

    async def scene(world: World, fs: FileSystem) -> None:
        world.meta.lose_replies = 1
        items = [(f"/{n}", b"x") for n in range(5)] + [("/0", b"y")]
        assert codes(await fs.batch_create(items)) == [None] * 5 + [Code.EXISTS]
        assert world.meta.calls.count(bc.BATCH_CREATE.number) == 2
        assert len(world.meta.requests) == 1

    play_fake(scene)


def test_messages_are_bounded_in_items_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bc, "ITEMS_MAX", 7)
    monkeypatch.setattr(bc, "BYTES_MAX", 1500)

    async def scene(world: World, fs: FileSystem) -> None:
        sent: list[Any] = []
        world.meta.before = lambda method, request: sent.append(request)
        items = [(f"/s{n:03}", bytes(4)) for n in range(20)] + [
            (f"/l{n}", bytes(900)) for n in range(3)
        ]
        assert await fs.batch_create(items) == [None] * 23
        assert sorted(len(r.items) for r in sent) == [1, 1, 7, 7, 7]
        sent.clear()
        found = await fs.batch_stat([path for path, _ in items])
        assert [one.st_size for one in found if isinstance(one, os.stat_result)] == [4] * 20 + [
            900
        ] * 3
        assert sorted(len(r.paths) for r in sent) == [2, 7, 7, 7]

    play_fake(scene)


def test_a_few_messages_are_under_way_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bc, "ITEMS_MAX", 1)

    async def scene(world: World, fs: FileSystem) -> None:
        now, most = 0, 0
        perform = fs._metadata.perform

        async def counted(method: Any, request: Any) -> Any:
            nonlocal now, most
            now += 1
            most = max(most, now)
            try:
                return await perform(method, request)
            finally:
                now -= 1

        monkeypatch.setattr(fs._metadata, "perform", counted)
        assert await fs.batch_create([(f"/{n}", b"x") for n in range(20)]) == [None] * 20
        assert most == batch.IN_FLIGHT_MAX

    play_fake(scene)


def test_larger_content_takes_the_ordinary_way() -> None:
    """Also such that meta would take no message with it; its errors are in their place."""

    async def scene(world: World, fs: FileSystem) -> None:
        large = [
            ("/a", bytes(1001)),
            ("/b", os.urandom(INLINE_BYTES_MAX + 1)),
            ("/none/c", bytes(1 << 20)),
        ]
        items = [large[0], ("/s", b"small"), *large[1:]]
        assert codes(await fs.batch_create(items)) == [None, None, None, Code.NOT_FOUND]
        for path, data in items[:3]:
            assert await read(fs, path) == data
        world.head().refuse.append(Code.NO_SPACE)
        again = await fs.batch_create([("/e", bytes(90_000))], exclusive=True)
        assert codes(again) == [Code.NO_SPACE]
        assert codes(await fs.batch_create([("/b", bytes(90_000))], exclusive=True)) == [
            Code.EXISTS
        ]

    play_fake(scene)


def test_a_store_with_small_transactions_gets_halves() -> None:
    async def scene(world: World, fs: FileSystem) -> None:
        sizes: list[int] = []

        def check(method: Any, request: Any) -> None:
            if method is bc.BATCH_CREATE:
                sizes.append(len(request.items))
                if len(request.items) > 3:
                    raise EmberfsError(Code.TRANSACTION_TOO_LARGE, "split it")

        world.meta.before = check
        assert await fs.batch_create([(f"/{n}", b"") for n in range(9)]) == [None] * 9
        assert sizes == [9, 4, 2, 2, 5, 2, 3]

    play_fake(scene)


def test_memory_of_any_kind_is_content() -> None:
    async def scene(world: World, fs: FileSystem) -> None:
        region = fs.allocate(100)
        region.view[:5] = b"hello"
        kinds = [bytearray(b"hello"), memoryview(b"hello"), region.slice(0, 5)]
        assert (
            await fs.batch_create([(f"/{n}", kind) for n, kind in enumerate(kinds)]) == [None] * 3
        )
        for number in range(3):
            assert await read(fs, f"/{number}") == b"hello"
        region.close()

    play_fake(scene)


def test_without_a_server_files_have_the_error_and_stats_raise() -> None:
    async def scene(world: World, fs: FileSystem) -> None:
        fs._metadata.deadline_ns = 100_000_000
        world.meta.refuse.extend([Code.BUSY] * 500)
        assert codes(await fs.batch_create([("/a", b""), ("/b", b"")])) == [Code.TIMEOUT] * 2
        with pytest.raises(TimeoutError):
            await fs.batch_stat(["/a"])
        world.meta.refuse.clear()

    play_fake(scene)


def test_an_answer_of_another_length_is_refused() -> None:
    async def scene(world: World, fs: FileSystem) -> None:
        number = bc.BATCH_CREATE.number
        endpoint = world.meta.endpoint
        await world.meta.stop()
        body = bc.BATCH_CREATE.encode_answer(bc.BatchCreateAnswer(()))
        world.meta.handlers[number] = lambda call: body
        await world.meta.start(endpoint)
        world.republish()
        assert codes(await fs.batch_create([("/a", b"")])) == [Code.MALFORMED]

    play_fake(scene)


def test_blocking_client(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def fake(mgmtd: Any, **_: Any) -> Any:
        world = World()
        world.meta.inline_bytes_max = 1000
        await world.start()
        try:
            yield system(world)
        finally:
            await world.close()

    monkeypatch.setattr(blocking, "connect", fake)
    with blocking.Client("127.0.0.1:1", cluster="none") as client:
        assert client.batch_create([("/a", b"1"), ("/b", b"22")]) == [None, None]
        found = client.batch_stat(["/a", "/b", "/c"])
        assert [one and one.st_size for one in found] == [1, 2, None]  # type: ignore[union-attr]
    assert not [t for t in threading.enumerate() if t.name == "emberfs-client"]
