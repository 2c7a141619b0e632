"""fsck of the metadata: every kind of damage is planted, found, and mended."""

import asyncio
import stat
from collections.abc import Awaitable, Callable

import pytest
from msgspec.structs import replace

from emberfs.deploy import fsck_records
from emberfs.deploy.fsck_records import RecordCheck
from emberfs.kv import keys
from emberfs.kv.transaction import pack_counter
from emberfs.meta import mend, schema
from emberfs.meta.check import Ancestry, LinkCount
from emberfs.proto.errors import Code
from emberfs.proto.files import Inode, Layout
from emberfs.proto.ids import ROOT_INODE, ChainId, InodeId
from emberfs.proto.meta_calls import Mend, MendKind, MendRequest
from unit.fsck_world import QUICK, Scene
from unit.meta_world import CHUNK, CLIENT, World, fails, play

LAYOUT = Layout(CHUNK, (ChainId(1),))
NOBODY = 999_999

Plant = Callable[[Scene], Awaitable[str]]


async def populate(scene: Scene) -> None:
    """A small tree with everything in it."""
    world = scene.world
    top = await world.mkdir(b"top")
    deep = await world.mkdir(b"deep", top.id)
    linked = await scene.file(b"linked", 3 * CHUNK)
    await world.link(linked.id, b"second", deep.id)
    await world.symlink(b"link", b"top/deep", deep.id)
    await world.set_xattr(linked.id, b"user.a", b"1")
    await world.create(b"open", session=5)
    await world.unlink(b"open")
    for number in range(7):
        await scene.file(b"f%d" % number, 100, top.id)


async def inode_of(scene: Scene, path: bytes) -> Inode:
    return (await scene.world.walk(path)).inode


async def plant_dangling(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top/f1")
    await scene.write(keys.inode_key(inode.id), None)
    return f"leads to inode {inode.id}, which does not exist"


async def plant_type(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top/f1")
    await scene.write_entry((await inode_of(scene, b"/top")).id, b"f1", inode.id, stat.S_IFLNK)
    return "b'f1' in directory"


async def plant_name_without_directory(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top/f1")
    await scene.write_entry(NOBODY, b"x", inode.id, stat.S_IFREG)
    return f"inode {NOBODY} does not exist"


async def plant_name_in_a_file(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top/f1")
    await scene.write_entry(inode.id, b"x", inode.id, stat.S_IFREG)
    return f"inode {inode.id} is no directory"


async def plant_links(scene: Scene) -> str:
    inode = await inode_of(scene, b"/linked")
    await scene.write_inode(replace(inode, nlink=3))
    return f"inode {inode.id} has link count 3, counted 2"


async def plant_zero_links(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top/f2")
    await scene.write_inode(replace(inode, nlink=0))
    return f"inode {inode.id} has link count 0, counted 1"


async def plant_directory_links(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top")
    await scene.write_inode(replace(inode, nlink=2))
    return f"inode {inode.id} has link count 2, counted 3"


async def plant_root_links(scene: Scene) -> str:
    inode = await inode_of(scene, b"/")
    await scene.write_inode(replace(inode, nlink=9))
    return "inode 1 has link count 9, counted 3"


async def plant_unreachable_file(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top/f3")
    await scene.write(keys.entry_key((await inode_of(scene, b"/top")).id, b"f3"), None)
    return f"inode {inode.id} has no name"


async def plant_unreachable_directory(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top")
    await scene.write(keys.entry_key(ROOT_INODE, b"top"), None)
    return f"inode {inode.id} has no name"


async def plant_forgotten(scene: Scene) -> str:
    inode = await scene.file(b"forgotten", 0)
    await scene.write(keys.entry_key(ROOT_INODE, b"forgotten"), None)
    await scene.write_inode(replace(inode, nlink=0))
    return f"inode {inode.id} has neither a name nor a session"


async def plant_directory_twice(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top/deep")
    await scene.write_entry(ROOT_INODE, b"again", inode.id, stat.S_IFDIR)
    return f"directory {inode.id} is b'again' in directory 1"


async def plant_wrong_parent(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top/deep")
    await scene.write_inode(replace(inode, parent=ROOT_INODE))
    return f"directory {inode.id} is b'deep' in directory"


async def plant_cycle(scene: Scene) -> str:
    """/top moves into /top/deep."""
    top, deep = await inode_of(scene, b"/top"), await inode_of(scene, b"/top/deep")
    await scene.write(keys.entry_key(ROOT_INODE, b"top"), None)
    await scene.write_entry(deep.id, b"top", top.id, stat.S_IFDIR)
    await scene.write_inode(replace(top, parent=deep.id))
    await scene.write_inode(replace(deep, nlink=3))
    await scene.write_inode(replace(await inode_of(scene, b"/"), nlink=2))
    return "lies below itself"


async def plant_session(scene: Scene) -> str:
    session = schema.SESSION.encode(schema.Session(CLIENT, True, False))
    await scene.write(keys.session_key(NOBODY, 4), session)
    return f"session of inode {NOBODY}"


async def plant_overdue_session(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top/f1")
    session = schema.SESSION.encode(schema.Session(1234, True, False))
    await scene.write(keys.session_key(inode.id, 4), session)
    scene.world.context.overdue = lambda: [1234]
    return f"session 4 on inode {inode.id}: its client"


async def plant_attribute(scene: Scene) -> str:
    await scene.write(keys.xattr_key(NOBODY, b"user.a"), b"1")
    return f"attribute of inode {NOBODY}"


async def plant_content(scene: Scene) -> str:
    await scene.write(keys.inline_key(NOBODY), b"x")
    return f"content of inode {NOBODY}"


async def plant_content_beside_chunks(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top/f1")
    await scene.write(keys.inline_key(inode.id), b"x")
    return f"inode {inode.id} has a content beside it and chunks"


async def plant_owner(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top/f1")
    await scene.write(keys.owner_key(NOBODY), keys.pack_owner(inode.id))
    return f"data id {NOBODY} leads to inode {inode.id}, which does not have it"


async def plant_damaged_owner(scene: Scene) -> str:
    await scene.write(keys.owner_key(NOBODY), b"?")
    return f"data id {NOBODY} leads to inode 0"


async def plant_data_id(scene: Scene) -> str:
    inode = await scene.file(b"grown", 0)
    assert inode.layout is not None
    layout = replace(inode.layout, data=InodeId(NOBODY))
    await scene.write_inode(replace(inode, layout=layout))
    return f"inode {inode.id} has data id {NOBODY}, which does not lead to it"


async def plant_trim(scene: Scene) -> str:
    await scene.write(keys.trim_key(NOBODY), schema.TRIM.encode(schema.Trim(5, LAYOUT)))
    return f"trim of inode {NOBODY}"


async def plant_queued(scene: Scene) -> str:
    inode = await inode_of(scene, b"/top/f1")
    record = schema.DELETED.encode(schema.Deleted(LAYOUT))
    await scene.write(keys.deleted_key(5, inode.id), record)
    return f"inode {inode.id} exists, and its chunks wait to be deleted"


async def plant_age(scene: Scene) -> str:
    await scene.write(keys.reply_age_key(keys.ReplyAge(4, 5, 6, 7)), b"")
    return "age of a reply that does not exist"


async def plant_reply(scene: Scene) -> str:
    await scene.write(keys.reply_key(6, 7), schema.REPLY.encode(schema.Reply(1, b"")))
    return "has no age"


async def plant_counter(scene: Scene) -> str:
    await scene.write(keys.INODE_COUNT_KEY, pack_counter(3))
    return "the counter of inodes says 3"


PLANTS: dict[str, Plant] = {
    name.removeprefix("plant_"): plant
    for name, plant in list(globals().items())
    if name.startswith("plant_")
}


def test_a_sound_tree_is_clean() -> None:
    async def scene(world: World) -> None:
        scene = Scene(world)
        await populate(scene)
        before = scene.world.rows(keys.Prefix.INODE)
        assert await scene.repaired() == []
        assert scene.records.mended == []
        assert scene.world.rows(keys.Prefix.INODE) == before

    play(scene)


@pytest.mark.parametrize("kind", sorted(PLANTS))
def test_o3_o11_planted_damage_is_found_and_mended(kind: str) -> None:
    """fsck finds every kind of damaged metadata, changes nothing unasked, and mends it if asked."""

    async def main(world: World) -> None:
        scene = Scene(world)
        await populate(scene)
        expected = await PLANTS[kind](scene)
        before = everything(world)
        texts = await scene.texts()
        assert any(expected in text for text in texts), texts
        assert everything(world) == before, "changed without --repair"
        assert await scene.repaired() == []
        assert any(expected in said for said in scene.said if said.startswith("repair: "))
        if kind == "queued":
            await inode_of(scene, b"/top/f1")

    play(main)  # checks every invariant at its end


def everything(world: World) -> list[tuple[bytes, bytes]]:
    return list(world.store.scan(b"", b"\xff"))


@pytest.mark.parametrize("kind", sorted(PLANTS))
def test_findings_do_not_depend_on_page_and_round_sizes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(world: World) -> None:
        scene = Scene(world)
        await populate(scene)
        await PLANTS[kind](scene)
        whole = await RecordCheck(scene.records).run()
        monkeypatch.setattr(fsck_records, "PAGE_ROWS", 3)
        monkeypatch.setattr(fsck_records, "INODES_AT_ONCE", 2)
        monkeypatch.setattr(fsck_records, "REPLIES_AT_ONCE", 2)
        monkeypatch.setattr(fsck_records, "DIRECTORIES_KNOWN_MAX", 1)
        pieces = await RecordCheck(scene.records).run()
        assert set(pieces) == set(whole)
        monkeypatch.undo()
        await scene.repaired()

    play(main)


def test_what_was_lost_is_found_with_its_content() -> None:
    async def main(world: World) -> None:
        scene = Scene(world)
        await populate(scene)
        top = await inode_of(scene, b"/top")
        await scene.write(keys.entry_key(ROOT_INODE, b"top"), None)
        assert await scene.repaired() == []
        assert (await inode_of(scene, b"/lost+found/#%d" % top.id)).id == top.id
        await inode_of(scene, b"/lost+found/#%d/deep/second" % top.id)
        await inode_of(scene, b"/lost+found/#%d/f6" % top.id)
        assert stat.S_IMODE((await inode_of(scene, b"/lost+found")).mode) == 0o700

    play(main)


def test_an_unreadable_inode_is_left_to_people() -> None:
    """Neither its names nor its chunks go."""

    async def main(world: World) -> None:
        scene = Scene(world)
        await populate(scene)
        inode = await inode_of(scene, b"/linked")
        record = schema.INODE.encode(inode)
        await scene.write(keys.inode_key(inode.id), b"\xc1 garbage")
        left = await scene.repaired()
        assert len(left) == 1
        assert "corrupt" in left[0]
        assert scene.records.mended == []
        assert scene.stores.removed == []
        await scene.write(keys.inode_key(inode.id), record)

    play(main)


def test_o3_a_subtree_is_checked_alone() -> None:
    """fsck of a path finds what is wrong below it and nothing else."""

    async def main(world: World) -> None:
        scene = Scene(world)
        await populate(scene)
        await scene.write_inode(replace(await inode_of(scene, b"/top"), nlink=2))
        await scene.write_entry((await inode_of(scene, b"/top")).id, b"bad", NOBODY, stat.S_IFREG)
        whole = await scene.texts()
        assert len(whole) == 2
        assert sorted(await scene.texts(QUICK._replace(path=b"/top"))) == sorted(whole)
        assert await scene.texts(QUICK._replace(path=b"/top/deep")) == []
        assert await scene.texts(QUICK._replace(path=b"/top/f1")) == []
        assert await scene.repaired(path=b"/top") == []

    play(main)


def test_a_living_cluster_gives_no_false_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names come, go and move while fsck reads page after page."""
    monkeypatch.setattr(fsck_records, "PAGE_ROWS", 30)  # more per page than churn adds

    async def main(world: World) -> None:
        scene = Scene(world)
        await populate(scene)
        ended = False

        async def churn() -> None:
            number = 0
            top = await inode_of(scene, b"/top")
            while not ended:
                number += 1
                made = await world.file(b"n")
                await world.link(made.id, b"m", top.id)
                await world.rename(b"n", b"o%d" % (number % 5), ROOT_INODE, top.id)
                await world.rename(b"m", b"p", top.id, ROOT_INODE)
                await world.mkdir(b"dir", top.id)
                await world.rename(b"dir", b"dir2", top.id, ROOT_INODE)
                await world.rmdir(b"dir2")
                await world.unlink(b"p")
                if number % 4 == 0:
                    await world.context.replies.forgetting.sweep(0)
                await asyncio.sleep(0)

        task = asyncio.create_task(churn())
        try:
            doubts = 0
            for _ in range(10):
                doubts += len(await RecordCheck(scene.records).run())
                assert await scene.texts() == []
            assert doubts, "this test is too kind: a single look saw nothing wrong"
        finally:
            ended = True
            await task

    play(main)


def test_a_repair_of_what_has_changed_is_refused() -> None:
    async def main(world: World) -> None:
        scene = Scene(world)
        await populate(scene)
        inode = await inode_of(scene, b"/linked")
        seen = schema.INODE.encode(inode)
        entry = schema.ENTRY.encode(schema.Entry(inode.id, stat.S_IFREG))
        await world.link(inode.id, b"third")
        key = keys.deleted_key(5, NOBODY)
        stale = [
            Mend(MendKind.SET_LINKS, inode=inode.id, number=9, expected=seen),
            Mend(MendKind.ATTACH, inode=inode.id, expected=seen),
            Mend(MendKind.DESTROY, inode=inode.id, expected=seen),
            Mend(MendKind.TRIM, inode=inode.id, expected=seen),
            Mend(MendKind.SET_PARENT, inode=inode.id, expected=seen),
            # The name is unchanged and in order: it leads to a file.
            Mend(MendKind.DROP_ENTRY, parent=ROOT_INODE, name=b"linked", expected=entry),
            Mend(MendKind.FIX_ENTRY, parent=ROOT_INODE, name=b"nothing", expected=entry),
            Mend(MendKind.DROP_RECORD, inode=InodeId(NOBODY), name=key, expected=b"x"),
            Mend(MendKind.END_SESSION, inode=inode.id, number=1, expected=b"x"),
        ]
        before = everything(world)
        for wanted in stale:
            await fails(Code.STALE, scene.records.mend(wanted))
        record = world.rows(keys.Prefix.FILE_SYSTEM)[0]
        forbidden = Mend(MendKind.DROP_RECORD, name=record[0], expected=record[1])
        await fails(Code.INVALID, scene.records.mend(forbidden))
        assert [row for row in everything(world) if row not in before] == []

    play(main)


def test_a_repair_is_performed_once() -> None:
    """A retry after a lost answer answers the same."""

    async def main(world: World) -> None:
        scene = Scene(world)
        await populate(scene)
        await plant_links(scene)
        found = (await RecordCheck(scene.records).run())[0].mend
        assert found is not None
        request = MendRequest(world.rid(), found)
        await mend.mend(world.context, request)
        await mend.mend(world.context, request)

    play(main)


def test_ancestry_finds_each_cycle_once() -> None:
    def directory(number: int, parent: int) -> Inode:
        return Inode(InodeId(number), stat.S_IFDIR, 0, 0, 2, 0, 0, 0, 0, parent=InodeId(parent))

    ancestry = Ancestry(100)
    for number, parent in ((2, 1), (3, 2), (5, 6), (6, 7), (7, 5), (8, 7), (9, 10)):
        ancestry.ask(directory(number, parent))
    assert ancestry.unknown() == [10]
    ancestry.learn(InodeId(10), directory(10, 1))
    assert ancestry.unknown() == []
    assert ancestry.cycles() == [5]
    ancestry.ask(directory(3, 2))
    assert ancestry.cycles() == []


def test_link_count_suspects_only_what_differs() -> None:
    count = LinkCount()
    for number, links in ((5, 1), (6, 2), (7, 0)):
        count.expect(Inode(InodeId(number), stat.S_IFREG, 0, 0, links, 0, 0, 0, 0))
    for number in (5, 6):
        count.see(1, schema.Entry(InodeId(number), stat.S_IFREG))
    assert count.suspects() == [6, 7]
