"""The path API and its blocking form, over the real fabric."""

import array
import asyncio
import os
import stat
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from emberfs.client import blocking
from emberfs.client.file import FileSystem, clean, connect
from emberfs.client.oserrors import FileSystemError
from emberfs.proto.errors import Code
from emberfs.proto.meta_calls import Caller
from unit.client_fakes import CHUNK, World, run


def system(world, number=7):
    files = world.client(number)
    cluster = SimpleNamespace(metadata=files.metadata, files=files)
    return FileSystem(cluster, Caller(0, 0), 0o022)


def test_write_read_seek_and_modes():
    async def test(world):
        fs = system(world)
        async with await fs.open("/a", "w+") as file:
            assert await file.write(b"hello world") == 11
            assert file.tell() == 11
            assert await file.seek(-5, os.SEEK_END) == 6
            assert await file.read() == b"world"
            assert await file.read(10) == b""
            await file.seek(0)
            sink = bytearray(5)
            assert await file.readinto(sink) == 5
            assert sink == b"hello"
            numbers = array.array("I", [0, 0])
            assert await file.pread(numbers, 0) == 8
            assert numbers.tobytes() == b"hello wo"
            assert await file.pwrite(numbers, 20) == 8
            assert (await file.stat()).st_size == 28
            assert await file.truncate(3) == 3
        async with await fs.open("/a", "a") as file:
            await file.write(b"+")
            assert file.tell() == 4
            with pytest.raises(OSError):
                await file.read(1)
        async with await fs.open("/a") as file:
            assert await file.read() == b"hel+"
            with pytest.raises(OSError):
                await file.write(b"x")
        with pytest.raises(FileExistsError):
            await fs.open("/a", "x")
        async with await fs.open("/a", "w"):
            pass
        assert (await fs.stat("/a")).st_size == 0
        assert stat.S_IMODE((await fs.stat("/a")).st_mode) == 0o644
        with pytest.raises(ValueError):
            await fs.open("/a", "rw")

    run(test)


def test_zero_copy_region():
    async def test(world):
        fs = system(world)
        region = fs.allocate(4 * CHUNK)
        region.view[: 2 * CHUNK] = os.urandom(2 * CHUNK)
        async with await fs.open("/r", "w+", direct=True) as file:
            await file.pwrite(region.slice(0, 2 * CHUNK), 0)
            assert await file.pread(region.slice(2 * CHUNK, 2 * CHUNK), 0) == 2 * CHUNK
        assert region.view[: 2 * CHUNK] == region.view[2 * CHUNK :]
        region.close()

    run(test)


def test_tree():
    async def test(world):
        fs = system(world)
        await fs.makedirs("/x/y/z")
        await fs.makedirs("/x/y", exist_ok=True)
        with pytest.raises(FileExistsError):
            await fs.makedirs("/x/y")
        for name in ("b", "a", "c"):
            async with await fs.open(f"/x/{name}", "w") as file:
                await file.write(name.encode())
        assert await fs.listdir("/x") == ["a", "b", "c", "y"]
        kinds = {e.name: (e.is_file(), e.is_dir(), e.path) async for e in fs.scandir("/x")}
        assert kinds["a"] == (True, False, "/x/a")
        assert kinds["y"] == (False, True, "/x/y")
        await fs.rename("/x/a", "/x/y/moved")
        assert not await fs.exists("/x/a")
        await fs.link("/x/b", "/x/again")
        assert (await fs.stat("/x/again")).st_nlink == 2
        await fs.symlink("x", "/way")
        assert await fs.readlink("/way") == "x"
        with pytest.raises(OSError, match="not empty"):
            await fs.rmdir("/x")
        with pytest.raises(IsADirectoryError):
            await fs.open("/x")
        with pytest.raises(IsADirectoryError):
            await fs.remove("/x")
        with pytest.raises(NotADirectoryError):
            await fs.listdir("/x/b")
        await fs.rmtree("/x")
        assert await fs.listdir() == ["way"]
        await fs.remove("/way")
        with pytest.raises(IsADirectoryError):
            await fs.rmdir("/")

    run(test)


def test_listing_goes_on_page_by_page(monkeypatch):
    monkeypatch.setattr("emberfs.client.file.PAGE_ROWS", 3)

    async def test(world):
        fs = system(world)
        names = [f"f{i:02}" for i in range(10)]
        for name in names:
            await (await fs.open(name, "w")).close()
        assert await fs.listdir("/") == names

    run(test)


def test_attributes():
    async def test(world):
        fs = system(world)
        await (await fs.open("/f", "w")).close()
        await fs.chmod("/f", 0o600)
        await fs.chown("/f", 5, -1)
        await fs.utime("/f", ns=(1_000_000_007, 2_000_000_009))
        found = await fs.stat("/f")
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert (found.st_uid, found.st_gid) == (5, 0)
        assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_007, 2_000_000_009)
        assert (found.st_mtime, found[stat.ST_MTIME]) == (2.000000009, 2)
        await fs.truncate("/f", 100)
        assert (await fs.stat("/f")).st_size == 100
        await fs.setxattr("/f", "user.a", b"1")
        assert await fs.getxattr("/f", "user.a") == b"1"
        assert await fs.listxattr("/f") == ["user.a"]
        await fs.removexattr("/f", "user.a")
        with pytest.raises(OSError):
            await fs.getxattr("/f", "user.a")
        space = await fs.statvfs()
        assert space.f_bavail * space.f_frsize == 1 << 39

    run(test)


def test_errors_are_oserrors_with_path_and_code():
    async def test(world):
        fs = system(world)
        with pytest.raises(FileNotFoundError) as caught:
            await fs.stat("/no/such")
        problem = caught.value
        assert isinstance(problem, FileSystemError)
        assert (problem.errno, problem.filename, problem.code) == (2, "/no/such", Code.NOT_FOUND)
        world.head().refuse.append(Code.NO_SPACE)
        file = await fs.open("/f", "w")
        await file.write(b"x")
        with pytest.raises(OSError, match="No space") as full:
            await file.close()
        assert full.value.filename == "/f"
        assert file.closed

    run(test)


def test_paths_are_cleaned():
    assert clean("a/b/") == clean("/a/b") == clean(b"//a/b") == b"/a/b"
    assert clean("/") == clean("") == b"/"


def test_connect_to_nothing_says_so_in_time():
    async def main():
        with pytest.raises(OSError) as caught:
            async with connect("127.0.0.1:1", cluster="none", timeout_ns=300_000_000):
                pass
        assert caught.value.code in (Code.UNREACHABLE, Code.TIMEOUT)

    asyncio.run(asyncio.wait_for(main(), 5))


def test_blocking_client(monkeypatch):
    worlds = []

    @asynccontextmanager
    async def fake(mgmtd, **_):
        world = World()
        worlds.append(world)
        await world.start()
        fs = system(world)
        try:
            yield fs
        finally:
            await world.close()

    monkeypatch.setattr(blocking, "connect", fake)

    def loops():
        return [t for t in threading.enumerate() if t.name == "emberfs-client"]

    with blocking.Client("127.0.0.1:1", cluster="none") as client:
        assert len(loops()) == 1
        client.makedirs("/d/e")
        with client.open("/d/f", "w+") as file:
            file.write(b"0123456789")
            sink = bytearray(4)
            assert file.pread(memoryview(sink), 3) == 4
            assert sink == b"3456"
            region = client.allocate(100)
            assert file.pread(region, 0) == 10
            assert bytes(region.view[:10]) == b"0123456789"
            file.fsync()
            region.close()
        assert client.listdir("/d") == ["e", "f"]
        assert [entry.name for entry in client.scandir("/d")] == ["e", "f"]
        with pytest.raises(FileNotFoundError):
            client.stat("/none")
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(client.open("/d/f").read()))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [b"0123456789"] * 4
        client.rmtree("/d")
        assert client.listdir() == []
    assert not loops()
