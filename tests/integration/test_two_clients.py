"""docs/semantics.md where two clients meet: a mount and the library, of one cluster."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable

import pytest

from emberfs.client.file import FileSystem, connect
from emberfs.proto.meta_calls import Caller
from integration.harness import LocalCluster
from semantics.posix_acls import ACCESS, DEFAULT, acl
from semantics.posix_tools import ALICE, BOB, make_file, mode_of, opened, pattern


def beside(cluster: LocalCluster, story: Callable[[FileSystem], Awaitable[None]], who=None) -> None:
    """Run a story of the library, as root or as somebody."""

    async def main() -> None:
        plan = cluster.plan
        caller = None if who is None else Caller(*who)
        async with connect(plan.mgmtd_address, cluster=plan.cluster, caller=caller) as files:
            await story(files)

    asyncio.run(main())


def test_a_file_without_a_name_stays_with_readers_and_writers_elsewhere(
    shared: LocalCluster,
) -> None:
    """Whoever removes the last name, at whatever client: all who have it open keep it."""
    path = shared.mount / "nameless"
    path.write_bytes(pattern(300_000))

    async def story(files: FileSystem) -> None:
        reader = await files.open("/nameless")
        writer = await files.open("/nameless", "r+")
        path.unlink()
        with pytest.raises(FileNotFoundError):
            await files.stat("/nameless")
        assert await reader.read() == pattern(300_000)
        assert (await reader.stat()).st_nlink == 0
        await writer.pwrite(b"after", 299_998)
        await writer.fsync()
        assert (await writer.stat()).st_size == 300_003
        await writer.close()
        assert (await reader.stat()).st_size == 300_003
        await reader.close()

    beside(shared, story)
    path.write_bytes(pattern(200_000))

    async def removed_here(files: FileSystem) -> None:
        with opened(path, os.O_RDONLY) as reader, opened(path, os.O_RDWR) as writer:
            await files.remove("/nameless")
            assert os.pread(reader, 200_001, 0) == pattern(200_000)
            os.pwrite(writer, b"late", 0)
            os.fsync(writer)
            assert os.pread(reader, 4, 0) == b"late"
            assert os.fstat(writer).st_nlink == 0

    beside(shared, removed_here)


def test_one_of_two_clients_creates(shared: LocalCluster) -> None:
    async def story(files: FileSystem) -> None:
        await (await files.open("/exclusive", "x")).close()
        with pytest.raises(FileExistsError):
            os.open(shared.mount / "exclusive", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.mkdir(shared.mount / "made")
        with pytest.raises(FileExistsError):
            await files.mkdir("/made")

    beside(shared, story)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_lists_and_flags_bind_the_library_too(shared: LocalCluster) -> None:
    """What the kernel enforces on the mount, meta enforces for those without a kernel."""
    path = make_file(shared.mount / "listed", ALICE, 0o600)
    os.setxattr(path, ACCESS, acl(f"u::rw u:{BOB.uid}:r g:: m::rw o::"))
    place = shared.mount / "defaults"
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    os.setxattr(place, DEFAULT, acl(f"u::rwx u:{BOB.uid}:rwx g::rx m::rwx o::"))

    async def as_bob(files: FileSystem) -> None:
        async with await files.open("/listed") as file:
            assert await file.read() == b"content"
        with pytest.raises(PermissionError):
            await files.open("/listed", "r+")
        async with await files.open("/defaults/f", "x"):
            pass

    async def as_nobody(files: FileSystem) -> None:
        with pytest.raises(PermissionError):
            await files.open("/listed")

    beside(shared, as_bob, BOB)
    beside(shared, as_nobody, (4567, 4567))
    assert mode_of(place / "f") == 0o660

    async def immutable(files: FileSystem) -> None:
        await files.setxattr("/listed", "trusted.emberfs.flags", b"i")
        with pytest.raises(PermissionError) as refused:
            path.write_bytes(b"x")
        assert refused.value.errno == errno.EPERM
        await files.removexattr("/listed", "trusted.emberfs.flags")
        path.write_bytes(b"x")

    beside(shared, immutable)


def test_a_hole_is_one_for_every_client(shared: LocalCluster) -> None:
    async def story(files: FileSystem) -> None:
        async with await files.open("/sparse", "w") as file:
            await file.pwrite(b"end", 64 << 20)
        assert (await files.stat("/sparse")).st_blocks * 512 < 32 << 20

    beside(shared, story)
    found = (shared.mount / "sparse").stat()
    assert found.st_size == (64 << 20) + 3
    assert 0 < found.st_blocks * 512 < 32 << 20
