"""POSIX cases: extended attributes by name space, right and size. See xattr(7)."""

import errno
import os
import time
from pathlib import Path

from semantics.posix_tools import (
    ALICE,
    BOB,
    make_directory,
    make_file,
    needs_root,
    pattern,
    refused,
)


@needs_root
def case_attribute_name_spaces(root: Path) -> None:
    path = make_file(root / "f", ALICE, 0o644)
    for name in ("user.a", "trusted.a", "security.a"):
        os.setxattr(path, name, b"value")
        assert os.getxattr(path, name) == b"value"
    assert {"user.a", "trusted.a", "security.a"} <= set(os.listxattr(path))
    for name in ("other.a", "plain", "system.a", "userx.a"):
        with refused(errno.EOPNOTSUPP):
            os.setxattr(path, name, b"value")

    def look() -> None:
        assert os.getxattr(path, "user.a") == b"value"
        assert os.getxattr(path, "security.a") == b"value"
        with refused(errno.ENODATA):
            os.getxattr(path, "trusted.a")
        assert "trusted.a" not in os.listxattr(path)
        for name in ("trusted.a", "security.a"):
            with refused(errno.EPERM):
                os.setxattr(path, name, b"mine")
            with refused(errno.EPERM):
                os.removexattr(path, name)

    ALICE.may(look)


@needs_root
def case_user_attributes_follow_the_mode(root: Path) -> None:
    path = make_file(root / "f", ALICE, 0o640)
    os.setxattr(path, "user.a", b"value")
    BOB.may_not(errno.EACCES, lambda: os.getxattr(path, "user.a"))
    BOB.may_not(errno.EACCES, lambda: os.setxattr(path, "user.a", b""))
    path.chmod(0o644)
    BOB.may(lambda: os.getxattr(path, "user.a"))
    BOB.may_not(errno.EACCES, lambda: os.removexattr(path, "user.a"))
    path.chmod(0o646)
    BOB.may(lambda: os.setxattr(path, "user.b", b""))
    BOB.may(lambda: os.removexattr(path, "user.b"))


@needs_root
def case_user_attributes_in_sticky_directories(root: Path) -> None:
    """On a sticky directory only its owner sets them, whoever may write there."""
    place = make_directory(root / "d", ALICE, 0o777)
    BOB.may(lambda: os.setxattr(place, "user.a", b""))
    place.chmod(0o1777)
    BOB.may_not(errno.EPERM, lambda: os.setxattr(place, "user.b", b""))
    ALICE.may(lambda: os.setxattr(place, "user.b", b""))


@needs_root
def case_user_attributes_are_for_files_and_directories(root: Path) -> None:
    os.symlink("nowhere", root / "link")
    os.mkfifo(root / "fifo")
    for name in ("link", "fifo"):
        with refused(errno.EPERM):
            os.setxattr(root / name, "user.a", b"", follow_symlinks=False)
        with refused(errno.ENODATA, errno.EPERM):
            os.getxattr(root / name, "user.a", follow_symlinks=False)
        os.setxattr(root / name, "trusted.a", b"x", follow_symlinks=False)
        assert os.getxattr(root / name, "trusted.a", follow_symlinks=False) == b"x"


def case_attribute_sizes(root: Path) -> None:
    path = root / "f"
    path.write_bytes(b"")
    longest = "user." + "n" * 250
    os.setxattr(path, longest, pattern(500))
    assert os.getxattr(path, longest) == pattern(500)
    with refused(errno.ERANGE):
        os.setxattr(path, longest + "n", b"")
    with refused(errno.E2BIG):
        os.setxattr(path, "user.big", bytes(65_537))
    try:
        os.setxattr(path, "user.big", pattern(65_536))
    except OSError as problem:  # ext4 keeps all of them in one block
        assert problem.errno == errno.ENOSPC  # noqa: PT017
    else:
        assert os.getxattr(path, "user.big") == pattern(65_536)
    with refused(errno.EOPNOTSUPP, errno.EINVAL):
        os.setxattr(path, "user.", b"")


def case_attributes_replace_and_vanish(root: Path) -> None:
    path = root / "f"
    path.write_bytes(b"")
    os.setxattr(path, "user.a", b"long value")
    os.setxattr(path, "user.a", b"s")
    assert os.getxattr(path, "user.a") == b"s"
    before = path.stat().st_mtime_ns
    os.setxattr(path, "user.a", b"", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b""
    assert path.stat().st_mtime_ns == before
    os.rename(path, root / "g")
    assert os.getxattr(root / "g", "user.a") == b""
    (root / "g").unlink()
    path.write_bytes(b"")
    assert [n for n in os.listxattr(path) if n.startswith("user.")] == []


def case_attributes_move_ctime(root: Path) -> None:
    path = root / "f"
    path.write_bytes(b"")
    os.utime(path, ns=(5, 5))
    for change in (
        lambda: os.setxattr(path, "user.a", b"1"),
        lambda: os.setxattr(path, "user.a", b"2"),
        lambda: os.removexattr(path, "user.a"),
    ):
        before = path.stat().st_ctime_ns
        _wait_for_the_clock()
        change()
        assert path.stat().st_ctime_ns > before
        assert path.stat().st_mtime_ns == 5


def _wait_for_the_clock() -> None:
    time.sleep(0.012)  # that of a local file system ticks coarsely


def case_many_attributes(root: Path) -> None:
    path = root / "f"
    path.write_bytes(b"")
    names = {f"user.n{index:03d}" for index in range(60)}
    for name in names:
        os.setxattr(path, name, name.encode())
    assert {n for n in os.listxattr(path) if n.startswith("user.")} == names
    for name in names:
        assert os.getxattr(path, name) == name.encode()
