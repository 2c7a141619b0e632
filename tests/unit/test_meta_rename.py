"""rename(2): the overwrite matrix, loops, flags, link counts."""

import pytest

from emberfs.meta.rename import EXCHANGE, NOREPLACE
from emberfs.proto.errors import Code
from emberfs.proto.ids import ROOT_INODE
from unit.meta_world import ALICE, World, fails, play


async def make(w: World, kind: str, name: bytes, parent: int) -> int:
    if kind == "file":
        return (await w.file(name, parent)).id
    if kind == "symlink":
        return (await w.symlink(name, b"t", parent)).id
    made = (await w.mkdir(name, parent)).id
    if kind == "full":
        await w.file(b"inside", made)
    return made


OK = None
MATRIX = [
    ("file", "nothing", OK),
    ("file", "file", OK),
    ("file", "symlink", OK),
    ("file", "directory", Code.IS_DIRECTORY),
    ("file", "full", Code.IS_DIRECTORY),
    ("symlink", "file", OK),
    ("symlink", "directory", Code.IS_DIRECTORY),
    ("directory", "nothing", OK),
    ("directory", "file", Code.NOT_DIRECTORY),
    ("directory", "symlink", Code.NOT_DIRECTORY),
    ("directory", "directory", OK),
    ("directory", "full", Code.NOT_EMPTY),
    ("full", "directory", OK),
    ("full", "full", Code.NOT_EMPTY),
]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("source", "target", "expected"), MATRIX)
def test_overwrite_matrix(source: str, target: str, expected: Code | None, across: bool) -> None:
    async def scene(w: World) -> None:
        old = (await w.mkdir(b"old")).id
        new = (await w.mkdir(b"new")).id if across else old
        moved = await make(w, source, b"s", old)
        replaced = await make(w, target, b"t", new) if target != "nothing" else 0
        if expected is not None:
            await fails(expected, w.rename(b"s", b"t", old, new))
            assert (await w.lookup(b"s", old)).id == moved
            return
        await w.rename(b"s", b"t", old, new)
        assert (await w.lookup(b"t", new)).id == moved
        await fails(Code.NOT_FOUND, w.lookup(b"s", old))
        if replaced:
            await fails(Code.NOT_FOUND, w.getattr(replaced))
        if source in ("directory", "full"):
            assert (await w.lookup(b"..", moved)).id == new

    play(scene)  # checks link counts and parents from the records


@pytest.mark.parametrize("target", ["file", "directory", "full", "symlink"])
@pytest.mark.parametrize("source", ["file", "directory", "full", "symlink"])
@pytest.mark.parametrize("across", [False, True])
def test_flags(source: str, target: str, across: bool) -> None:
    async def scene(w: World) -> None:
        old = (await w.mkdir(b"old")).id
        new = (await w.mkdir(b"new")).id if across else old
        one, other = await make(w, source, b"s", old), await make(w, target, b"t", new)
        await fails(Code.EXISTS, w.rename(b"s", b"t", old, new, NOREPLACE))
        await w.rename(b"s", b"t", old, new, EXCHANGE)
        assert (await w.lookup(b"t", new)).id == one
        assert (await w.lookup(b"s", old)).id == other
        await fails(Code.NOT_FOUND, w.rename(b"s", b"free", old, new, EXCHANGE))
        await w.rename(b"s", b"free", old, new, NOREPLACE)
        await fails(Code.INVALID, w.rename(b"t", b"x", new, new, NOREPLACE | EXCHANGE))
        await fails(Code.INVALID, w.rename(b"t", b"x", new, new, 4))

    play(scene)


def test_two_names_of_one_file_stay() -> None:
    async def scene(w: World) -> None:
        file = await w.file(b"a")
        await w.link(file.id, b"b")
        await w.rename(b"a", b"b")
        await w.rename(b"a", b"a")
        assert await w.names() == [b"a", b"b"]

    play(scene)


def test_no_directory_below_itself() -> None:
    async def scene(w: World) -> None:
        a = (await w.mkdir(b"a")).id
        b = (await w.mkdir(b"b", a)).id
        c = (await w.mkdir(b"c", b)).id
        await fails(Code.INVALID, w.rename(b"a", b"x", ROOT_INODE, a))
        await fails(Code.INVALID, w.rename(b"a", b"x", ROOT_INODE, c))
        await fails(Code.INVALID, w.rename(b"b", b"c", a, b))
        await fails(Code.NOT_EMPTY, w.rename(b"c", b"a", b, ROOT_INODE))
        await fails(Code.INVALID, w.rename(b"c", b"a", b, ROOT_INODE, EXCHANGE))
        await fails(Code.INVALID, w.rename(b"a", b"c", ROOT_INODE, b, EXCHANGE))
        await w.rename(b"c", b"c", b, ROOT_INODE)
        await w.rename(b"a", b"a", ROOT_INODE, c)
        assert (await w.walk(b"/c/a/b")).inode.id == b

    play(scene)


def test_crossing_moves_cannot_make_a_loop() -> None:
    """mv a b/ and mv b a/ at once: the ancestors are in the conflict set, so one loses."""

    async def scene(w: World) -> None:
        a, b = (await w.mkdir(b"a")).id, (await w.mkdir(b"b")).id
        await w.rename(b"a", b"a", ROOT_INODE, b)
        await fails(Code.INVALID, w.rename(b"b", b"b", ROOT_INODE, a))

    play(scene)


def test_names_that_cannot_be_renamed() -> None:
    async def scene(w: World) -> None:
        await w.file(b"a")
        await fails(Code.NOT_FOUND, w.rename(b"nothing", b"x"))
        await fails(Code.NAME_TOO_LONG, w.rename(b"a", b"n" * 256))
        await fails(Code.INVALID, w.rename(b".", b"x"))
        await fails(Code.INVALID, w.rename(b"a", b".."))

    play(scene)


def test_permission() -> None:
    async def scene(w: World) -> None:
        mine = (await w.mkdir(b"mine", mode=0o777)).id
        roots = (await w.mkdir(b"roots")).id
        await w.file(b"f", mine, ALICE)
        await w.file(b"r", roots)
        await w.mkdir(b"locked", mine, mode=0o555)
        await fails(Code.ACCESS, w.rename(b"f", b"f", mine, roots, who=ALICE))
        await fails(Code.ACCESS, w.rename(b"r", b"r", roots, mine, who=ALICE))
        other = (await w.mkdir(b"other", mode=0o777)).id
        await fails(Code.ACCESS, w.rename(b"locked", b"l", mine, other, who=ALICE))
        await w.rename(b"locked", b"l", mine, mine, who=ALICE)
        await w.rename(b"f", b"f", mine, other, who=ALICE)

    play(scene)


def test_replaced_open_file_lives_on() -> None:
    async def scene(w: World) -> None:
        old = await w.create(b"t", session=9)
        await w.file(b"s")
        await w.rename(b"s", b"t")
        assert (await w.getattr(old.id)).nlink == 0
        await w.settle(old.id, 9, close=True)
        await fails(Code.NOT_FOUND, w.getattr(old.id))

    play(scene)
