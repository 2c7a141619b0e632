"""Access lists and flags in meta, for clients without a kernel between: acl(5), ioctl_iflags(2)."""

import stat

import pytest

from emberfs.meta import acl
from emberfs.meta.inode_xattrs import ACCESS, DEFAULT, FLAGS
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ROOT_INODE
from emberfs.proto.meta_calls import Caller
from unit.meta_world import ALICE, BOB, World, fails, play

CAROL = Caller(3000, 3000, (50,))
DAVE = Caller(4000, 4000)
NO_ID = 0xFFFF_FFFF


def listed(owner: int, group: int, mask: int, other: int, **named: int) -> bytes:
    """A list; named entries as u2000=6, g50=4."""
    entries = [acl.Entry(acl.OWNER, owner, NO_ID)]
    users = {n: r for n, r in named.items() if n[0] == "u"}
    groups = {n: r for n, r in named.items() if n[0] == "g"}
    entries += [acl.Entry(acl.USER, r, int(n[1:])) for n, r in users.items()]
    entries.append(acl.Entry(acl.OWNING_GROUP, group, NO_ID))
    entries += [acl.Entry(acl.GROUP, r, int(n[1:])) for n, r in groups.items()]
    entries.append(acl.Entry(acl.MASK, mask, NO_ID))
    entries.append(acl.Entry(acl.OTHER, other, NO_ID))
    return acl.pack(entries)


MINIMAL = acl.pack(
    [
        acl.Entry(acl.OWNER, 7, NO_ID),
        acl.Entry(acl.OWNING_GROUP, 7, NO_ID),
        acl.Entry(acl.OTHER, 0, NO_ID),
    ]
)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (b"", Code.INVALID),
        (b"\2\0\0\0\1", Code.INVALID),
        (b"\1\0\0\0", Code.UNSUPPORTED),
        (acl.pack([acl.Entry(acl.OWNER, 7, NO_ID)]), Code.INVALID),
        (acl.pack([acl.Entry(64, 7, NO_ID)]), Code.INVALID),
        (acl.pack([acl.Entry(acl.OWNER, 8, NO_ID)]), Code.INVALID),
        (listed(7, 7, 7, 7).replace(b"\x10\0", b"\x20\0"), Code.INVALID),  # two others, no mask
        (listed(7, 7, 7, 7, **{f"u{n}": 7 for n in range(600)}), Code.NO_SPACE),
    ],
)
def test_lists_that_are_none(value: bytes, code: Code) -> None:
    with pytest.raises(EmberfsError) as raised:
        acl.parse(value)
    assert raised.value.code == code


def test_list_decides_for_every_class() -> None:
    async def scene(w: World) -> None:
        await w.setattr(ROOT_INODE, mode=0o777)
        f = (await w.file(b"f", who=ALICE, mode=0o600)).id
        await fails(Code.ACCESS, w.open_file(f, 1, BOB))
        await w.set_xattr(f, ACCESS, listed(6, 0, 6, 0, u2000=6, g50=4), who=ALICE)
        assert stat.S_IMODE((await w.getattr(f)).mode) == 0o660
        await w.open_file(f, 1, BOB, write=True)
        await w.open_file(f, 2, CAROL)
        await fails(Code.ACCESS, w.open_file(f, 3, CAROL, write=True))
        await fails(Code.ACCESS, w.open_file(f, 3, DAVE))
        await w.setattr(f, ALICE, mode=0o640)  # the mask shrinks
        await fails(Code.ACCESS, w.open_file(f, 3, BOB, write=True))
        shown = acl.parse((await w.xattr(f, ACCESS, DAVE)).value)
        assert [entry.rights for entry in shown] == [6, 6, 0, 4, 4, 0]
        await w.setattr(f, ALICE, mode=0o604)  # as the kernel: no group right, no list
        await w.open_file(f, 4, BOB)
        await w.set_xattr(f, ACCESS, None, who=ALICE)
        assert (await w.xattr(f)).names == ()

    play(scene)


def test_list_is_set_by_owners_where_it_may_be() -> None:
    async def scene(w: World) -> None:
        await w.setattr(ROOT_INODE, mode=0o777)
        f = (await w.file(b"f", who=ALICE)).id
        await fails(Code.NOT_PERMITTED, w.set_xattr(f, ACCESS, MINIMAL, who=BOB))
        await fails(Code.ACCESS, w.set_xattr(f, DEFAULT, MINIMAL, who=ALICE))
        await fails(Code.NO_ATTRIBUTE, w.set_xattr(f, ACCESS, None, who=ALICE))
        await w.set_xattr(f, ACCESS, MINIMAL, who=ALICE)  # says no more than a mode
        assert stat.S_IMODE((await w.getattr(f)).mode) == 0o770
        assert (await w.xattr(f)).names == ()
        link = (await w.symlink(b"l", b"f")).id
        await fails(Code.UNSUPPORTED, w.set_xattr(link, ACCESS, MINIMAL))

    play(scene)


def test_default_list_replaces_the_umask() -> None:
    async def scene(w: World) -> None:
        d = (await w.mkdir(b"d", mode=0o777)).id
        assert stat.S_IMODE((await w.create(b"a", d, mode=0o666, umask=0o077)).mode) == 0o600
        default = listed(7, 5, 7, 0, u2000=7)
        await w.set_xattr(d, DEFAULT, default)
        made = await w.create(b"b", d, mode=0o666, umask=0o077, session=2)
        assert stat.S_IMODE(made.mode) == 0o660
        await w.open_file(made.id, 3, BOB, write=True)
        below = await w.mkdir(b"sub", d, mode=0o777)
        assert (below.default_acl, stat.S_IMODE(below.mode)) == (default, 0o770)
        assert (await w.symlink(b"l", b"x", d)).acl == b""
        await w.set_xattr(d, DEFAULT, MINIMAL)
        plain = await w.create(b"c", d, mode=0o666, umask=0o077, session=4)
        assert (stat.S_IMODE(plain.mode), plain.acl) == (0o660, b"")

    play(scene)


def test_immutable_is_root_s_to_set() -> None:
    async def scene(w: World) -> None:
        await w.setattr(ROOT_INODE, mode=0o777)
        f = (await w.file(b"f", who=ALICE, mode=0o666)).id
        await fails(Code.NOT_PERMITTED, w.set_xattr(f, FLAGS, b"i", who=ALICE))
        await fails(Code.INVALID, w.set_xattr(f, FLAGS, b"x"))
        await w.open_file(f, 1, ALICE, write=True)
        await w.set_xattr(f, FLAGS, b"i")
        for call in (
            w.unlink(b"f", who=ALICE),
            w.rename(b"f", b"g"),
            w.link(f, b"g"),
            w.setattr(f, mode=0o600),
            w.setattr(f, mtime_ns=-1, atime_ns=-1),
            w.setattr(f, length=0),
            w.open_file(f, 2, write=True),
            w.create(b"f", session=3),
            w.set_xattr(f, b"user.a", b"1"),
            w.set_xattr(f, ACCESS, MINIMAL),
        ):
            await fails(Code.NOT_PERMITTED, call)
        await w.open_file(f, 4)
        assert (await w.xattr(f)).names == (FLAGS,)
        assert (await w.xattr(f, who=ALICE)).names == ()
        await w.set_xattr(f, FLAGS, None)
        await w.unlink(b"f", who=ALICE)

    play(scene)


def test_a_file_is_sparse_while_it_may_have_holes() -> None:
    """Only then is storage asked what it takes."""

    async def scene(w: World) -> None:
        f = (await w.create(b"f")).id
        assert not (await w.settle(f, length=10)).sparse
        assert (await w.settle(f, length=100, sparse=True)).sparse
        assert (await w.settle(f, length=101)).sparse
        assert not (await w.setattr(f, length=0)).sparse
        assert (await w.setattr(f, length=50)).sparse
        assert (await w.setattr(f, length=10)).sparse

    play(scene)
