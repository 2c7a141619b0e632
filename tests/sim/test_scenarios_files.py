"""The fault list on the simulated cluster, for names and files: one directed scenario per row."""

import asyncio

import pytest

from emberfs.client.file import FileSystem
from emberfs.client.oserrors import FileSystemError
from emberfs.meta import forgetting
from emberfs.proto.errors import Code
from emberfs.proto.ids import SECOND
from sim.meta_view import seen_of, store_of
from sim.scenario_files import Stage, play_files


async def write(fs: FileSystem, path: str, content: bytes, mode: str = "w") -> None:
    """Make a file in one go."""
    file = await fs.open(path, mode)
    await file.write(content)
    await file.close()


async def read(fs: FileSystem, path: str) -> bytes:
    """All of a file."""
    file = await fs.open(path)
    content = await file.read()
    await file.close()
    return content


def test_c9_o11_meta_dies_at_every_operation_of_its_disk() -> None:
    """Wherever the metadata server dies amid a call, the retry tells the truth: one effect."""

    async def script(stage: Stage) -> None:
        for step in range(24):
            name, faults = f"/n{step}", stage.meta.disk.faults
            faults.die_after = step % 6
            await stage.at(0, lambda fs, n=name: fs.mkdir(n))
            await stage.at(0, lambda fs, n=name: fs.rename(n, n + "x"))
            await stage.at(0, lambda fs, n=name: write(fs, n + "x/f", b"1", "x"))
            faults.die_after = -1
            await stage.at(1, lambda fs, n=name: fs.link(n + "x/f", n))

    async def revive_always(stage: Stage) -> None:
        playing = asyncio.ensure_future(script(stage))
        lives = stage.meta.lives
        while not playing.done():
            await asyncio.sleep(0.1)
            if not stage.meta.running:
                stage.revive(stage.meta)
        playing.result()
        assert stage.meta.lives - lives > 6

    play_files(revive_always)


def test_c9_replies_and_requests_are_lost_and_repeated() -> None:
    """Half of all messages are lost or come twice: every call has one effect and one answer."""

    async def script(stage: Stage) -> None:
        network = stage.world.network
        network.loss_share, network.duplicate_share = 0.1, 0.4
        network.late_duplicate_share = 0.3
        for step in range(12):
            await stage.at(step % 3, lambda fs, s=step: fs.mkdir(f"/d{s}"))
            await stage.at(0, lambda fs, s=step: fs.rename(f"/d{s}", f"/e{s}"))
            with pytest.raises(FileSystemError) as caught:
                await stage.at(1, lambda fs, s=step: fs.rmdir(f"/d{s}"))
            assert caught.value.code == Code.NOT_FOUND
        network.loss_share = network.duplicate_share = network.late_duplicate_share = 0.0
        names = await stage.at(2, lambda fs: fs.listdir("/"))
        assert sorted(names) == sorted([f"e{step}" for step in range(12)] + ["f"])

    play_files(script)


def test_c9_o20_sessions_of_a_killed_writer_end_and_its_files_go() -> None:
    """A client dies with an unlinked file open: session and chunks are gone in bounded time."""

    async def script(stage: Stage) -> None:
        async def leave_open(fs: FileSystem) -> None:
            file = await fs.open("/lost", "w", direct=True)
            await file.write(b"x" * 9000)
            await fs.remove("/lost")

        await stage.at(1, leave_open)
        assert [left.kind for left in stage.leftovers] == ["session"]
        stage.client(1).kill()
        await stage.until(lambda: not stage.leftovers, 25)

    play_files(script)


def test_o2_c9_what_a_killed_client_was_told_is_written_can_be_read() -> None:
    """A direct write behind the end outlives its client, with the length of the file."""

    async def script(stage: Stage) -> None:
        async def leave_open(fs: FileSystem) -> None:
            file = await fs.open("/kept", "w", direct=True)
            await file.write(b"x" * 9000)

        await stage.at(1, leave_open)
        stage.client(1).kill()
        await stage.until(lambda: not stage.leftovers, 25)
        assert await stage.at(0, lambda fs: read(fs, "/kept")) == b"x" * 9000

    play_files(script)


def test_o2_o20_a_frozen_client_wakes_after_its_file_was_collected() -> None:
    """Its buffered bytes are refused, and no chunk appears that nobody would remove."""

    async def script(stage: Stage) -> None:
        async def buffer(fs: FileSystem) -> None:
            file = await fs.open("/f/gone", "w")
            await file.write(b"x" * 9000)
            await asyncio.sleep(0.5)
            await file.write(b"y" * 9000)
            await file.close()

        writing = stage.begin(1, buffer)
        await asyncio.sleep(0.2)
        process = stage.client(1).process
        assert process is not None
        process.pause()
        await stage.at(0, lambda fs: fs.remove("/f/gone"))
        await stage.until(lambda: not stage.leftovers, 30)
        process.resume()
        with pytest.raises(FileSystemError) as caught:
            await writing
        assert caught.value.code in (Code.STALE, Code.NOT_FOUND)

    play_files(script)


def test_o5_all_clients_change_the_same_names_at_once() -> None:
    """A storm of conflicting calls ends, every call answered, one winner for each name."""

    async def script(stage: Stage) -> None:
        async def grab(fs: FileSystem, name: str) -> bool:
            try:
                await fs.mkdir(name)
            except FileExistsError:
                return False
            return True

        for turn in range(10):
            calls = [
                stage.begin(index % 3, lambda fs, t=turn: grab(fs, f"/t{t}")) for index in range(18)
            ]
            assert sum(await asyncio.gather(*calls)) == 1

    play_files(script)


def test_o6_r12_power_fails_while_files_are_cut_and_collected() -> None:
    """The metadata server loses its power again and again amid truncations and removals."""

    async def script(stage: Stage) -> None:
        async def churn(fs: FileSystem, name: str) -> None:
            await write(fs, name, b"1" * 70_000)
            await fs.truncate(name, 10)
            await write(fs, name, b"2" * 300)
            await fs.remove(name)
            await write(fs, name, b"3" * 20)

        for turn in range(6):
            calls = [
                stage.begin(i, lambda fs, i=i, t=turn: churn(fs, f"/f/{i}{t}")) for i in (0, 1)
            ]
            await asyncio.sleep(0.004 * (turn + 1))
            stage.cut_meta()
            await asyncio.sleep(0.5)
            stage.power_on()
            await asyncio.gather(*calls, return_exceptions=True)
            for call, index in zip(calls, (0, 1), strict=True):
                if call.exception() is None:
                    name = f"/f/{index}{turn}"
                    assert await stage.at(2, lambda fs, n=name: read(fs, n)) == b"3" * 20

    play_files(script)


def test_r12_what_was_fsynced_or_closed_survives_the_power_of_all_servers() -> None:
    """Data, length and name are there after the power of every server failed at once."""

    async def script(stage: Stage) -> None:
        async def make(fs: FileSystem) -> None:
            await write(fs, "/f/closed", b"c" * 70_000)
            file = await fs.open("/f/synced", "w")
            await file.write(b"s" * 500)
            await file.fsync()

        await stage.at(1, make)
        stage.cut_meta()
        for machine in stage.world.storage:
            machine.power_cut()
        stage.client(1).kill()
        for machine in stage.world.storage:
            machine.power_on()
            stage.revive(machine)
        stage.power_on()
        assert await stage.world.until_serving(60 * SECOND)
        assert await stage.at(0, lambda fs: read(fs, "/f/closed")) == b"c" * 70_000
        assert await stage.at(0, lambda fs: read(fs, "/f/synced")) == b"s" * 500

    play_files(script)


def test_o11_r9_an_open_file_outlives_its_name_and_its_metadata_server() -> None:
    """Unlinked elsewhere, meta killed and restarted: the reader reads on."""

    async def script(stage: Stage) -> None:
        await stage.at(0, lambda fs: write(fs, "/f/x", b"x" * 9000))
        file = await stage.at(1, lambda fs: fs.open("/f/x"))
        await stage.at(0, lambda fs: fs.remove("/f/x"))
        for cut in (False, True):
            if cut:
                await stage.at(0, lambda fs: fs.cluster.metadata.stable())
                stage.cut_meta()
                await asyncio.sleep(0.5)
                stage.power_on()
            else:
                stage.meta.kill()
                await asyncio.sleep(0.5)
                stage.revive(stage.meta)
            await asyncio.sleep(20)

            async def all_of_it(_: FileSystem) -> bytes:
                await file.seek(0)
                return await file.read()

            assert await stage.at(1, all_of_it) == b"x" * 9000
        await stage.at(1, lambda _: file.close())

    play_files(script)


def test_o22_remembered_replies_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies are forgotten after their time; the store does not grow with the calls."""
    monkeypatch.setattr(forgetting.Forgetting.sweep, "__defaults__", (40 * SECOND,))
    counts: list[int] = []

    async def script(stage: Stage) -> None:
        for _ in range(30):
            for name in ("/a", "/b"):
                await stage.at(0, lambda fs, n=name: fs.mkdir(n))
                await stage.at(0, lambda fs, n=name: fs.rmdir(n))
            await asyncio.sleep(6)
            counts.append(len(seen_of(store_of(stage.meta)).answers))

    play_files(script, names=False)  # that checker needs all replies
    assert max(counts) < 60
