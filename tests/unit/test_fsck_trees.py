"""fsck of quotas, removed trees and the trash: damage is planted, found, and mended."""

from collections.abc import Awaitable, Callable

import pytest
from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import pack_counter
from emberfs.meta import schema
from emberfs.meta.quota import BYTES, FILES
from emberfs.meta.tree_calls import trash_name
from emberfs.proto.files import Inode
from emberfs.proto.ids import ROOT_INODE, TRASH_INODE, InodeId
from unit.fsck_world import Scene
from unit.meta_world import World, play
from unit.quota_world import check_counters, check_tree, listed, set_quota, walked
from unit.test_meta_trees import remove_tree, trash, trashed

Plant = Callable[[Scene], Awaitable[str]]


async def populate(scene: Scene) -> None:
    """Quotas in quotas, a removed tree, and things in the trash."""
    world = scene.world
    top = await world.mkdir(b"top")
    inner = await world.mkdir(b"inner", top.id)
    deep = await world.mkdir(b"deep", inner.id)
    for place in (top, inner, deep):
        await scene.file(b"f", 100, place.id)
    linked = await scene.file(b"linked", 7, deep.id)
    await world.link(linked.id, b"second", inner.id)
    await set_quota(world, top.id, bytes_max=10_000)
    await set_quota(world, inner.id, files_max=100)
    await walked(world)
    away = await world.mkdir(b"away", inner.id)
    await world.file(b"f", away.id)
    await trash(world, b"away", inner.id)
    await world.file(b"plain")
    await trash(world, b"plain")
    gone = await world.mkdir(b"gone")
    lower = await world.mkdir(b"lower", gone.id)
    await world.file(b"f", lower.id)
    await remove_tree(world, b"gone")


async def inode_of(scene: Scene, path: bytes) -> Inode:
    return (await scene.world.walk(path)).inode


async def plant_usage(scene: Scene) -> str:
    top = await inode_of(scene, b"/top")
    await scene.write(keys.usage_key(top.id, FILES), pack_counter(3))
    return f"the quota of directory {top.id} says 3 files"


async def plant_lost_counter(scene: Scene) -> str:
    inner = await inode_of(scene, b"/top/inner")
    await scene.write(keys.usage_key(inner.id, BYTES), None)
    return "and 0 bytes, there are"


async def plant_file_of_no_quota(scene: Scene) -> str:
    file = await inode_of(scene, b"/top/inner/deep/f")
    await scene.write_inode(replace(file, quota=InodeId(0)))
    return f"inode {file.id} (b'f' in directory"


async def plant_directory_of_another_quota(scene: Scene) -> str:
    deep = await inode_of(scene, b"/top/inner/deep")
    top = await inode_of(scene, b"/top")
    await scene.write_inode(replace(deep, quota=top.id))
    return f"counts for quota {top.id}, its directory for {deep.quota}"


async def plant_lost_quota(scene: Scene) -> str:
    inner = await inode_of(scene, b"/top/inner")
    await scene.write(keys.quota_key(inner.id), None)
    return f"counts for quota {inner.id}"


async def plant_quota_of_nothing(scene: Scene) -> str:
    await scene.write(keys.quota_key(4711), schema.QUOTA.encode(schema.Quota(InodeId(0), 5)))
    return "the quota of directory 4711 limits nothing"


async def plant_quota_in_another(scene: Scene) -> str:
    inner = await inode_of(scene, b"/top/inner")
    await scene.write(keys.quota_key(inner.id), schema.QUOTA.encode(schema.Quota(InodeId(0), 5)))
    return f"inode {inner.id} (b'inner' in directory"


async def plant_hidden(scene: Scene) -> str:
    key = scene.world.rows(keys.Prefix.REMOVED)[0][0]
    await scene.write(key, None)
    return "was removed, and nobody takes it to pieces"


async def plant_queued(scene: Scene) -> str:
    top = await inode_of(scene, b"/top/inner/deep")
    record = schema.REMOVED.encode(schema.Removed(0))
    await scene.write(keys.removed_key(5, top.id), record)
    return "waits to be deleted with what is below it, and has a name"


async def plant_trash_without_record(scene: Scene) -> str:
    item = (await trashed(scene.world))[0]
    await scene.write(keys.trash_key(item.time_ns, item.id), None)
    return f"inode {item.id} is in the trash without a record"


async def plant_strange_name_in_the_trash(scene: Scene) -> str:
    item = (await trashed(scene.world))[1]
    key = keys.trash_key(item.time_ns, item.id)
    await scene.write(key, None)
    await scene.write(keys.entry_key(TRASH_INODE, trash_name(key)), None)
    await scene.write_entry(TRASH_INODE, b"odd", item.id, item.mode)
    return f"inode {item.id} is in the trash without a record"


async def plant_record_of_nothing(scene: Scene) -> str:
    record = schema.Trashed(0, ROOT_INODE, b"x", b"/x", 0o100000)
    await scene.write(keys.trash_key(5, 4711), schema.TRASHED.encode(record))
    return "inode 4711 is not in the trash, its record is"


PLANTS = [value for name, value in sorted(globals().items()) if name.startswith("plant_")]


def test_a_sound_tree_has_no_findings() -> None:
    async def scene(world: World) -> None:
        s = Scene(world)
        await populate(s)
        assert await s.texts() == []
        while await world.context.removed_trees.step():
            assert await s.texts() == []
        assert [f.text for f in (await s.fsck()).findings] == []

    play(scene)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_damage_is_found_and_mended(plant: Plant) -> None:
    async def scene(world: World) -> None:
        s = Scene(world)
        await populate(s)
        seen = await plant(s)
        texts = await s.texts()
        assert any(seen in text for text in texts), texts
        for _ in range(3):
            await s.repaired()
            await walked(world)
            await world.context.removed_trees.finish()
        assert await s.texts() == []
        await check_counters(world)
        check_tree(world)
        assert all(report.state == "active" for report in await listed(world))

    play(scene)


def test_counting_is_no_damage() -> None:
    async def scene(world: World) -> None:
        s = Scene(world)
        await populate(s)
        await set_quota(world, ROOT_INODE, files_max=1000)
        while await world.context.quota_walks.step():
            assert await s.texts() == []
        assert await s.texts() == []

    play(scene)
