"""Names: POSIX rules of lookup, making, linking, removing and listing."""

import asyncio
import stat

import pytest

from emberfs.kv import keys
from emberfs.meta import namespace, resolve
from emberfs.proto import meta_calls as calls
from emberfs.proto.errors import Code
from emberfs.proto.files import LINK_COUNT_MAX
from emberfs.proto.ids import ROOT_INODE
from unit.meta_world import ALICE, BOB, CLIENT, ROOT, World, fails, play


def test_make_look_up_and_remove() -> None:
    async def scene(w: World) -> None:
        made = await w.mkdir(b"d", mode=0o750)
        assert (made.mode, made.nlink, made.parent) == (stat.S_IFDIR | 0o750, 2, ROOT_INODE)
        assert await w.lookup(b"d") == made
        assert (await w.lookup(b".", made.id)).id == made.id
        assert (await w.lookup(b"..", made.id)).id == ROOT_INODE
        assert (await w.lookup(b"..")).id == ROOT_INODE
        assert (await w.getattr(ROOT_INODE)).nlink == 3
        await w.rmdir(b"d")
        assert (await w.getattr(ROOT_INODE)).nlink == 2
        await fails(Code.NOT_FOUND, w.lookup(b"d"))
        await fails(Code.NOT_FOUND, w.getattr(made.id))
        await fails(Code.NOT_FOUND, w.file(b"x", made.id))

    play(scene)


@pytest.mark.parametrize(
    ("mode", "rdev", "kept"),
    [
        (stat.S_IFIFO | 0o600, 0, 0),
        (stat.S_IFSOCK | 0o600, 5, 0),
        (stat.S_IFCHR | 0o600, 0x105, 0x105),
        (stat.S_IFBLK | 0o600, 0x801, 0x801),
        (stat.S_IFREG | 0o4755, 0, 0),
    ],
)
def test_special_files(mode: int, rdev: int, kept: int) -> None:
    async def scene(w: World) -> None:
        made = await w.mknod(b"x", mode, rdev=rdev)
        assert (made.mode, made.rdev, made.nlink) == (mode, kept, 1)
        assert (made.layout is not None) == stat.S_ISREG(mode)
        (row,) = (await w.readdir()).rows
        assert (row.name, row.mode, row.inode) == (b"x", stat.S_IFMT(mode), made)
        await w.unlink(b"x")

    play(scene)


def test_what_mknod_refuses() -> None:
    async def scene(w: World) -> None:
        open_to_all = await w.mkdir(b"d", mode=0o777)
        await fails(Code.NOT_PERMITTED, w.mknod(b"c", stat.S_IFCHR, open_to_all.id, ALICE))
        await fails(Code.INVALID, w.mknod(b"l", stat.S_IFLNK | 0o777))
        for name, code in [
            (b"", Code.NOT_FOUND),
            (b".", Code.EXISTS),
            (b"..", Code.EXISTS),
            (b"a/b", Code.INVALID),
            (b"a\0", Code.INVALID),
            (b"n" * 256, Code.NAME_TOO_LONG),
            (b"d", Code.EXISTS),
        ]:
            await fails(code, w.mkdir(name))
            await fails(code, w.create(name, exclusive=True))
            await fails(code, w.symlink(name, b"t"))
        await w.file(b"n" * 255)
        await w.file(b"file")
        file = await w.lookup(b"file")
        await fails(Code.NOT_DIRECTORY, w.file(b"x", file.id))
        await fails(Code.NOT_DIRECTORY, w.lookup(b"x", file.id))
        await fails(Code.NOT_FOUND, w.file(b"x", 999_999))

    play(scene)


def test_directory_times_and_owner_follow_changes() -> None:
    async def scene(w: World) -> None:
        shared = await w.mkdir(b"s", mode=0o777)
        await w.setattr(shared.id, gid=50, mode=0o2777)
        before = await w.getattr(shared.id)
        child = await w.mkdir(b"d", shared.id, ALICE)
        file = await w.file(b"f", shared.id, BOB)
        after = await w.getattr(shared.id)
        assert after.mtime_ns == after.ctime_ns > before.mtime_ns
        assert (child.uid, child.gid, child.mode & 0o7777) == (1000, 50, 0o2755)
        assert (file.uid, file.gid, file.mode & 0o7777) == (2000, 50, 0o644)
        grouped = await w.file(b"g", shared.id, BOB, mode=0o2755)
        assert grouped.mode & 0o7777 == 0o755  # BOB is no member of group 50
        assert (await w.file(b"h", shared.id, ALICE, mode=0o2755)).mode & 0o7777 == 0o2755

    play(scene)


def test_hard_links() -> None:
    async def scene(w: World) -> None:
        file = await w.file(b"a")
        linked = await w.link(file.id, b"b")
        assert linked.nlink == 2
        assert (await w.lookup(b"b")).id == file.id
        await fails(Code.EXISTS, w.link(file.id, b"b"))
        directory = await w.mkdir(b"d")
        await fails(Code.NOT_PERMITTED, w.link(directory.id, b"e"))
        await w.unlink(b"a")
        assert (await w.getattr(file.id)).nlink == 1
        await w.unlink(b"b")
        await fails(Code.NOT_FOUND, w.getattr(file.id))
        await fails(Code.NOT_FOUND, w.link(file.id, b"c"))
        symlink = await w.symlink(b"l", b"target")
        assert (await w.link(symlink.id, b"l2")).nlink == 2

    play(scene)


def test_link_count_is_limited() -> None:
    async def scene(w: World) -> None:
        file = await w.file(b"a")
        full = calls.InodeAnswer(file).inode
        from msgspec.structs import replace

        from emberfs.meta import schema

        raw = schema.INODE.encode(replace(full, nlink=LINK_COUNT_MAX))
        w.store.write([(keys.inode_key(file.id), raw)])
        await fails(Code.TOO_MANY_LINKS, w.link(file.id, b"b"))
        w.store.write([(keys.inode_key(file.id), schema.INODE.encode(full))])

    play(scene)


def test_symlinks() -> None:
    async def scene(w: World) -> None:
        link = await w.symlink(b"l", b"some/where")
        assert (link.mode, link.length, link.symlink) == (
            stat.S_IFLNK | 0o777,
            10,
            b"some/where",
        )
        await fails(Code.NOT_FOUND, w.symlink(b"m", b""))
        await fails(Code.NAME_TOO_LONG, w.symlink(b"m", b"x" * 4096))
        await fails(Code.LOOP, w.create(b"l"))

    play(scene)


def test_what_remove_refuses() -> None:
    async def scene(w: World) -> None:
        d = await w.mkdir(b"d")
        await w.file(b"f")
        await w.file(b"x", d.id)
        await fails(Code.NOT_EMPTY, w.rmdir(b"d"))
        await fails(Code.IS_DIRECTORY, w.unlink(b"d"))
        await fails(Code.NOT_DIRECTORY, w.rmdir(b"f"))
        await fails(Code.NOT_FOUND, w.unlink(b"nothing"))
        await fails(Code.INVALID, w.rmdir(b"."))
        await fails(Code.NOT_EMPTY, w.rmdir(b".."))
        await fails(Code.NAME_TOO_LONG, w.unlink(b"n" * 256))

    play(scene)


def test_permission_and_sticky_bit() -> None:
    async def scene(w: World) -> None:
        closed = await w.mkdir(b"closed")
        await fails(Code.ACCESS, w.file(b"x", closed.id, ALICE))
        secret = await w.mkdir(b"secret", mode=0o700)
        await fails(Code.ACCESS, w.lookup(b"x", secret.id, ALICE))
        await fails(Code.ACCESS, w.readdir(secret.id, who=ALICE))
        tmp = await w.mkdir(b"tmp", mode=0o1777)
        await w.file(b"hers", tmp.id, ALICE)
        await w.mkdir(b"hers.d", tmp.id, ALICE, mode=0o777)
        await w.file(b"his", tmp.id, BOB)
        await fails(Code.NOT_PERMITTED, w.unlink(b"hers", tmp.id, BOB))
        await fails(Code.NOT_PERMITTED, w.rmdir(b"hers.d", tmp.id, BOB))
        await fails(Code.NOT_PERMITTED, w.rename(b"hers", b"x", tmp.id, tmp.id, who=BOB))
        await fails(Code.NOT_PERMITTED, w.rename(b"his", b"hers", tmp.id, tmp.id, who=BOB))
        await w.unlink(b"hers", tmp.id, ALICE)
        await w.unlink(b"his", tmp.id, ROOT)

    play(scene)


def test_groups_grant() -> None:
    async def scene(w: World) -> None:
        d = await w.mkdir(b"d", mode=0o070)
        await w.setattr(d.id, gid=50)
        await w.file(b"a", d.id, ALICE)  # 50 is one of her supplementary groups
        await fails(Code.ACCESS, w.file(b"b", d.id, BOB))
        mine = await w.mkdir(b"mine", mode=0o077)
        await w.setattr(mine.id, uid=ALICE.uid)
        await fails(Code.ACCESS, w.file(b"b", mine.id, ALICE))  # the owner's bits alone count

    play(scene)


# ---------------------------------------------------------------- paths


def test_paths() -> None:
    async def scene(w: World) -> None:
        a = await w.mkdir(b"a")
        b = await w.mkdir(b"b", a.id)
        f = await w.file(b"f", b.id)
        await w.symlink(b"up", b"../../a", b.id)
        await w.symlink(b"abs", b"/a/b/f", b.id)
        await w.symlink(b"dangling", b"nowhere", b.id)
        for path, inode in [
            (b"/", ROOT_INODE),
            (b"//a///b/f", f.id),
            (b"a/b/f", f.id),
            (b"/a/./b/../b/f", f.id),
            (b"/../../a", a.id),
            (b"/a/b/up", a.id),
            (b"/a/b/up/b/abs", f.id),
            (b"/a/b/", b.id),
        ]:
            assert (await w.walk(path)).inode.id == inode, path
        assert (await w.walk(b"/a/b/up", follow=False)).inode.is_symlink()
        assert (await w.walk(b"/a/b/up/", follow=False)).inode.id == a.id
        assert (await w.walk(b"/a/b/dangling", follow=False)).inode.is_symlink()
        for path, code in [
            (b"", Code.NOT_FOUND),
            (b"/a/x", Code.NOT_FOUND),
            (b"/a/b/dangling", Code.NOT_FOUND),
            (b"/a/b/f/", Code.NOT_DIRECTORY),
            (b"/a/b/f/x", Code.NOT_DIRECTORY),
            (b"/a/b/f/..", Code.NOT_DIRECTORY),
            (b"/" + b"n" * 256, Code.NAME_TOO_LONG),
            (b"/a" * 2048, Code.NAME_TOO_LONG),
        ]:
            await fails(code, w.walk(path))

    play(scene)


def test_parent_of_a_path() -> None:
    async def scene(w: World) -> None:
        a = await w.mkdir(b"a")
        await w.symlink(b"l", b"a")
        await w.file(b"f")
        for path, inode, name in [
            (b"/new", ROOT_INODE, b"new"),
            (b"/a/new/", a.id, b"new"),
            (b"/l/new", a.id, b"new"),
            (b"/l", ROOT_INODE, b"l"),
            (b"/", ROOT_INODE, b"."),
            (b"/a/..", a.id, b".."),
        ]:
            answer = await w.walk(path, parent=True)
            assert (answer.inode.id, answer.name) == (inode, name), path
        await fails(Code.NOT_DIRECTORY, w.walk(b"/f/new", parent=True))
        await fails(Code.NOT_FOUND, w.walk(b"/x/new", parent=True))

    play(scene)


def test_symlink_loops_and_chains() -> None:
    async def scene(w: World) -> None:
        await w.symlink(b"me", b"me")
        await fails(Code.LOOP, w.walk(b"/me"))
        await w.file(b"l0")
        for i in range(41):
            await w.symlink(b"l%d" % (i + 1), b"l%d" % i)
        assert (await w.walk(b"/l40")).inode.is_file()
        await fails(Code.LOOP, w.walk(b"/l41"))

    play(scene)


def test_search_permission_on_every_directory() -> None:
    async def scene(w: World) -> None:
        a = await w.mkdir(b"a", mode=0o700)
        b = await w.mkdir(b"b", a.id)
        await w.file(b"f", b.id)
        await fails(Code.ACCESS, w.walk(b"/a/b/f", ALICE))
        assert (await w.walk(b"/a", ALICE)).inode.id == a.id

    play(scene)


# ---------------------------------------------------------------- listing


def test_pages_of_two_thousand_names_with_inserts_and_removals() -> None:
    async def scene(w: World) -> None:
        d = (await w.mkdir(b"d")).id
        for i in range(2000):
            await w.file(b"n%04d" % i, d)
        seen: list[bytes] = []
        after, more = b"", True
        while more:
            page = await w.readdir(d, after, limit=97)
            assert len(page.rows) <= 97
            for row in page.rows:
                assert row.inode is not None
                assert row.inode.id == row.id
            seen += [row.name for row in page.rows]
            more, after = page.more, seen[-1]
            await w.file(after + b"+", d)  # right behind: is seen
            await w.file(b"a" + after, d)  # before: is not
            await w.unlink(seen[0], d)
            del seen[0]
        stable = [name for name in seen if not name.endswith(b"+")]
        assert len(seen) == len(set(seen))
        assert seen == sorted(seen)
        assert stable == [b"n%04d" % i for i in range(2000 - len(stable), 2000)]
        assert not (await w.readdir(d, b"\xff" * 255)).rows

    play(scene)


def test_listing_needs_no_inodes() -> None:
    async def scene(w: World) -> None:
        file = await w.file(b"f")
        request = calls.ReaddirRequest(ROOT, ROOT_INODE, b"", 10, plus=False)
        answer = await namespace.readdir(w.context, request)
        assert answer.rows == (calls.ReaddirRow(b"f", file.id, stat.S_IFREG, None),)
        assert not answer.more

    play(scene)


# ---------------------------------------------------------------- races


def test_one_winner_creates_a_name() -> None:
    async def scene(w: World) -> None:
        outcomes = await asyncio.gather(
            *(w.create(b"x", exclusive=True, session=i) for i in range(1, 9)),
            *(w.mkdir(b"x") for _ in range(4)),
            return_exceptions=True,
        )
        lost = [o for o in outcomes if isinstance(o, Exception)]
        assert len(lost) == len(outcomes) - 1
        assert {o.code for o in lost} == {Code.EXISTS}  # type: ignore[attr-defined]

    play(scene)


def test_rmdir_against_create_inside_with_interleaved_transactions() -> None:
    """Both read before either commits: one of them must lose, whoever is first."""

    async def scene(w: World) -> None:
        for remove_first in (True, False):
            d = (await w.mkdir(b"d")).id
            create, remove = w.engine.begin(), w.engine.begin()
            parent = await namespace.load_directory(create, d, ROOT, 3)
            inode = namespace.new_inode(w.context, 5555, parent, ROOT, stat.S_IFREG)  # type: ignore[arg-type]
            await namespace.add_name(create, w.context, parent, b"f", inode)
            root = await namespace.load_directory(remove, ROOT_INODE, ROOT, 3)
            assert await namespace.is_empty(remove, d)
            remove.clear(keys.entry_key(ROOT_INODE, b"d"))
            await namespace.destroy(remove, await namespace.load_inode(remove, d), 1)
            namespace.touch_directory(remove, root, 1, links=-1)
            first, second = (remove, create) if remove_first else (create, remove)
            await first.commit()
            await fails(Code.CONFLICT, second.commit())
            if not remove_first:
                await w.unlink(b"f", d)
                await w.rmdir(b"d")

    play(scene)


def test_answers_are_what_the_protocol_says() -> None:
    async def scene(w: World) -> None:
        request = calls.LookupRequest(ROOT, ROOT_INODE, b".")
        answer = await resolve.lookup(w.context, request)
        assert calls.LOOKUP.decode_answer(calls.LOOKUP.encode_answer(answer)) == answer
        assert w.rid().client == CLIENT

    play(scene)
