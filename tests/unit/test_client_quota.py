"""Writers under a quota: refused at the write, exactly, and asking seldom."""

import pytest

from emberfs.client.quotaroom import ROOM_AGE_NS, QuotaRoom
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import KiB, MiB
from emberfs.proto.meta_calls import Caller
from unit.client_fakes import run

ME = Caller(0, 0)


async def make(files, name=b"f", **flags):
    _, file = await files.create(ME, 1, name, 0o644, **flags)
    return file


def test_a_write_beyond_the_quota_fails_at_once():
    async def test(world):
        world.meta.quota_bytes = 1 * MiB
        file = await make(world.client())
        for at in range(0, 1 * MiB, 64 * KiB):
            await file.write(at, bytes(64 * KiB))
        with pytest.raises(EmberfsError) as caught:
            await file.write(1 * MiB, b"x")
        assert caught.value.code == Code.QUOTA
        await file.write(5, b"inside there is room")
        with pytest.raises(EmberfsError):
            await file.write(0, b"x", append=True)
        world.meta.quota_bytes += 10
        await file.write(1 * MiB, b"x" * 10)
        await file.close()
        assert world.meta.inodes[file.inode_id].length == 1 * MiB + 10

    run(test)


@pytest.mark.parametrize("direct", [False, True])
def test_one_large_write_uses_all_the_room(direct):
    async def test(world):
        world.meta.quota_bytes = 1 * MiB
        file = await make(world.client())
        with pytest.raises(EmberfsError):
            await file.write(0, bytes(1 * MiB + 1), direct=direct)
        assert await file.write(0, bytes(1 * MiB), direct=direct) == 1 * MiB
        await file.close()

    run(test)


def test_far_from_the_limit_nobody_asks():
    async def test(world):
        world.meta.quota_bytes = 1 << 40
        file = await make(world.client())
        for at in range(0, 4 * MiB, 64 * KiB):
            await file.write(at, bytes(64 * KiB))
        assert not world.meta.settled
        await file.close()
        plain = world.client(8)
        world.meta.quota_bytes = None
        await (await make(plain, b"g")).write(0, b"x")
        assert plain.metadata.rooms.of(file.inode_id) is None

    run(test)


def test_the_room_of_a_closed_file_is_forgotten():
    async def test(world):
        world.meta.quota_bytes = 100
        files = world.client()
        file = await make(files)
        reader = await make(files, write=False)
        assert files.metadata.rooms.of(file.inode_id) == QuotaRoom(
            100, files.metadata.rooms.of(file.inode_id).told_ns
        )
        await reader.close()
        assert files.metadata.rooms.of(file.inode_id) is not None
        await file.close()
        assert files.metadata.rooms.of(file.inode_id) is None

    run(test)


def test_room_grows_old():
    room = QuotaRoom(100, 5)
    assert room.allows(100, 5 + ROOM_AGE_NS)
    assert not room.allows(101, 5)
    assert not room.allows(1, 6 + ROOM_AGE_NS)
