"""POSIX cases: access control lists, see acl(5). A local file system without them skips these."""

import errno
import os
import stat
import struct
from pathlib import Path

from semantics.posix_tools import (
    ALICE,
    BOB,
    CAROL,
    User,
    make_directory,
    make_file,
    mode_of,
    needs_root,
    refused,
)

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
_TAGS = {"u": (1, 2), "g": (4, 8), "m": (16, 16), "o": (32, 32)}
_NO_ID = 0xFFFF_FFFF
DAVE = User(4567, 4567)


def acl(text: str) -> bytes:
    """The kernel's form of "u::rwx u:1234:r g::r m::rwx o::" (acl(5), short text form)."""
    parts = [struct.pack("<I", 2)]
    for word in text.split():
        kind, name, rights = word.split(":")
        bits = sum({"r": 4, "w": 2, "x": 1}[letter] for letter in rights)
        number = int(name) if name else _NO_ID
        parts.append(struct.pack("<HHI", _TAGS[kind][bool(name)], bits, number))
    return b"".join(parts)


def show(value: bytes) -> str:
    """The text of a list."""
    names = {number: kind for kind, numbers in _TAGS.items() for number in numbers}
    words = []
    for tag, bits, number in struct.iter_unpack("<HHI", value[4:]):
        rights = "".join(letter for bit, letter in ((4, "r"), (2, "w"), (1, "x")) if bits & bit)
        words.append(f"{names[tag]}:{'' if number == _NO_ID else number}:{rights}")
    return " ".join(words)


def has_acls(root: Path) -> bool:
    """Tell whether the file system keeps them."""
    probe = root / "probe"
    probe.write_bytes(b"")
    try:
        os.setxattr(probe, ACCESS, acl("u::rw g::r o::r"))
    except OSError as problem:
        assert problem.errno == errno.EOPNOTSUPP  # noqa: PT017
        return False
    finally:
        probe.unlink()
    return True


def _read(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY))


def _write(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY))


@needs_root
def case_acl_named_users_and_groups(root: Path) -> None:
    if not has_acls(root):
        return
    path = make_file(root / "f", ALICE, 0o600)
    os.setxattr(path, ACCESS, acl(f"u::rw u:{BOB.uid}:rw g::r g:50:r m::rw o::"))
    assert mode_of(path) == 0o660  # the group bits are the mask
    BOB.may(lambda: _write(path))
    CAROL.may(lambda: _read(path))  # in both groups
    CAROL.may_not(errno.EACCES, lambda: _write(path))
    DAVE.may_not(errno.EACCES, lambda: _read(path))
    path.chmod(0o640)  # the mask shrinks
    BOB.may_not(errno.EACCES, lambda: _write(path))
    BOB.may(lambda: _read(path))
    assert show(os.getxattr(path, ACCESS)) == f"u::rw u:{BOB.uid}:rw g::r g:50:r m::r o::"
    path.chmod(0o664)
    BOB.may(lambda: _write(path))
    DAVE.may(lambda: _read(path))
    os.removexattr(path, ACCESS)
    BOB.may_not(errno.EACCES, lambda: _write(path))
    with refused(errno.ENODATA):
        os.getxattr(path, ACCESS)


@needs_root
def case_acl_denies_what_the_mode_would_grant(root: Path) -> None:
    """The owning group's entry counts, not the group bits; a named user's comes first."""
    if not has_acls(root):
        return
    path = make_file(root / "f", User(0, ALICE.gid), 0o664)
    os.setxattr(path, ACCESS, acl(f"u::rw u:{BOB.uid}: g:: m::rw o::rw"))
    assert mode_of(path) == 0o666
    BOB.may_not(errno.EACCES, lambda: _read(path))
    ALICE.may_not(errno.EACCES, lambda: _read(path))
    DAVE.may(lambda: _write(path))


@needs_root
def case_acl_in_directories(root: Path) -> None:
    if not has_acls(root):
        return
    place = make_directory(root / "d", ALICE, 0o700)
    os.setxattr(place, ACCESS, acl(f"u::rwx u:{BOB.uid}:rwx u:{DAVE.uid}:x g:: m::rwx o::"))
    BOB.may(lambda: (place / "f").write_bytes(b"x"))
    BOB.may(lambda: os.rename(place / "f", place / "g"))
    DAVE.may(lambda: _read(place / "g"))
    DAVE.may_not(errno.EACCES, lambda: os.listdir(place))
    DAVE.may_not(errno.EACCES, lambda: os.unlink(place / "g"))
    CAROL.may_not(errno.EACCES, lambda: os.stat(place / "g"))
    BOB.may(lambda: os.unlink(place / "g"))


@needs_root
def case_acl_is_set_by_owners(root: Path) -> None:
    if not has_acls(root):
        return
    path = make_file(root / "f", ALICE, 0o666)
    value = acl(f"u::rw u:{BOB.uid}:rw g::r m::rw o::")
    BOB.may_not(errno.EPERM, lambda: os.setxattr(path, ACCESS, value))
    ALICE.may(lambda: os.setxattr(path, ACCESS, value))
    BOB.may(lambda: os.getxattr(path, ACCESS))
    BOB.may_not(errno.EPERM, lambda: os.removexattr(path, ACCESS))
    assert ACCESS in os.listxattr(path)


@needs_root
def case_acl_that_says_no_more_than_a_mode(root: Path) -> None:
    if not has_acls(root):
        return
    path = make_file(root / "f", ALICE, 0o600)
    before = path.stat().st_ctime_ns
    os.setxattr(path, ACCESS, acl("u::r g::rw o::x"))
    assert mode_of(path) == 0o461
    assert path.stat().st_ctime_ns >= before
    assert ACCESS not in os.listxattr(path)


@needs_root
def case_acl_must_be_well_formed(root: Path) -> None:
    if not has_acls(root):
        return
    path = make_file(root / "f", ALICE, 0o600)
    for text in (
        "u::rw",
        "u::rw g::r",
        f"u::rw u:{BOB.uid}:r g::r o::r",  # no mask
        f"g::r u::rw u:{BOB.uid}:r m::r o::r",
        "u::rw u::rw g::r o::r",
    ):
        with refused(errno.EINVAL):
            os.setxattr(path, ACCESS, acl(text))
    with refused(errno.EINVAL):
        os.setxattr(path, ACCESS, b"\2\0\0\0\1")
    with refused(errno.EACCES):
        os.setxattr(path, DEFAULT, acl("u::rw g::r o::r"))
    assert mode_of(path) == 0o600


@needs_root
def case_acl_inherited_from_the_directory(root: Path) -> None:
    """The default list takes the place of the umask."""
    if not has_acls(root):
        return
    place = make_directory(root / "d", ALICE, 0o777)
    default = acl(f"u::rwx u:{BOB.uid}:rwx g::rx m::rwx o::")
    os.setxattr(place, DEFAULT, default)
    old = os.umask(0o077)
    try:
        (place / "f").write_bytes(b"x")
        (place / "sub").mkdir()
        os.mkfifo(place / "fifo")
        os.symlink("f", place / "link")
        os.close(os.open(place / "program", os.O_CREAT | os.O_WRONLY, 0o750))
    finally:
        os.umask(old)
    assert mode_of(place / "f") == 0o660
    assert mode_of(place / "sub") == 0o770
    assert mode_of(place / "fifo") == 0o660
    assert mode_of(place / "link") == 0o777
    assert mode_of(place / "program") == 0o750
    shown = f"u::rw u:{BOB.uid}:rwx g::rx m::rw o::"
    assert show(os.getxattr(place / "f", ACCESS)) == shown
    assert os.getxattr(place / "sub", DEFAULT) == default
    with refused(errno.ENODATA):
        os.getxattr(place / "f", DEFAULT)
    BOB.may(lambda: _write(place / "f"))
    BOB.may_not(errno.EACCES, lambda: _write(place / "program"))
    BOB.may(lambda: (place / "sub" / "deep").mkdir())
    DAVE.may_not(errno.EACCES, lambda: _read(place / "f"))


@needs_root
def case_acl_minimal_default_list(root: Path) -> None:
    if not has_acls(root):
        return
    place = make_directory(root / "d", ALICE, 0o777)
    os.setxattr(place, DEFAULT, acl("u::rwx g::rwx o::"))
    old = os.umask(0o022)
    try:
        (place / "f").write_bytes(b"x")
        (place / "sub").mkdir()
    finally:
        os.umask(old)
    assert (mode_of(place / "f"), mode_of(place / "sub")) == (0o660, 0o770)
    with refused(errno.ENODATA):
        os.getxattr(place / "f", ACCESS)
    os.removexattr(place, DEFAULT)
    os.umask(0o022)
    (place / "g").write_bytes(b"")
    assert mode_of(place / "g") == 0o644
    os.umask(old)


@needs_root
def case_acl_and_set_group(root: Path) -> None:
    """A list set by an owner outside the group takes set-group-ID away, as chmod does."""
    if not has_acls(root):
        return
    path = make_file(root / "f", User(ALICE.uid, BOB.gid), 0o755)
    path.chmod(0o2755)
    ALICE.may(lambda: os.setxattr(path, ACCESS, acl(f"u::rwx u:{DAVE.uid}:rx g::rx m::rx o::")))
    assert mode_of(path) == 0o750
    place = make_directory(root / "d", User(0, BOB.gid), 0o777)
    place.chmod(0o2777)
    os.setxattr(place, DEFAULT, acl(f"u::rwx u:{DAVE.uid}:rx g::rx m::rx o::"))
    (place / "sub").mkdir()
    assert stat.S_IMODE((place / "sub").stat().st_mode) & ~0o777 == stat.S_ISGID


@needs_root
def case_acl_survives_rename_and_link(root: Path) -> None:
    if not has_acls(root):
        return
    path = make_file(root / "f", ALICE, 0o600)
    os.setxattr(path, ACCESS, acl(f"u::rw u:{BOB.uid}:r g:: m::r o::"))
    os.link(path, root / "g")
    os.rename(path, root / "h")
    for name in ("g", "h"):
        BOB.may(lambda name=name: _read(root / name))
        DAVE.may_not(errno.EACCES, lambda name=name: _read(root / name))
