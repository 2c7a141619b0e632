"""POSIX cases: the immutable flag of chattr(1), see ioctl_iflags(2).

A local file system is asked by ioctl, emberfs, through which ioctl does not pass, by the attribute.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

from semantics.posix_tools import (
    ALICE,
    EXCHANGE,
    make_directory,
    make_file,
    needs_root,
    opened,
    refused,
    rename2,
)

GET_FLAGS, SET_FLAGS = 0x80086601, 0x40086602
IMMUTABLE = 0x10
NAME = "trusted.emberfs.flags"


def set_immutable(path: Path, on: bool) -> bool:
    """Set or clear the flag; False where there is none."""
    with opened(path, os.O_RDONLY) as fd:
        try:
            (flags,) = struct.unpack("l", fcntl.ioctl(fd, GET_FLAGS, bytes(8)))
            flags = flags | IMMUTABLE if on else flags & ~IMMUTABLE
            fcntl.ioctl(fd, SET_FLAGS, struct.pack("l", flags))
        except OSError as problem:
            if problem.errno != errno.ENOTTY:
                return False
            os.setxattr(path, NAME, b"i" if on else b"")
    return True


@needs_root
def case_immutable_file(root: Path) -> None:
    path = make_file(root / "f", ALICE, 0o666)
    os.setxattr(path, "user.a", b"1")
    if not set_immutable(path, True):
        return
    attempts: list[Callable[[], object]] = [
        lambda: os.open(path, os.O_WRONLY),
        lambda: os.open(path, os.O_RDONLY | os.O_TRUNC),
        lambda: os.truncate(path, 0),
        lambda: os.chmod(path, 0o600),
        lambda: os.chown(path, 0, 0),
        lambda: os.utime(path),
        lambda: os.utime(path, (1, 1)),
        lambda: os.link(path, root / "g"),
        lambda: os.rename(path, root / "g"),
        lambda: os.unlink(path),
        lambda: os.setxattr(path, "user.a", b"2"),
        lambda: os.setxattr(path, "trusted.a", b"2"),
        lambda: os.removexattr(path, "user.a"),
    ]
    try:
        for attempt in attempts:
            with refused(errno.EPERM):
                attempt()
        (root / "g").write_bytes(b"g")
        with refused(errno.EPERM):
            os.rename(root / "g", path)
        with refused(errno.EPERM):
            rename2(root / "g", path, EXCHANGE)
        assert path.read_bytes() == b"content"
        assert os.getxattr(path, "user.a") == b"1"
    finally:
        set_immutable(path, False)
    path.write_bytes(b"new")
    path.unlink()


@needs_root
def case_immutable_directory(root: Path) -> None:
    """Its names stay; what they lead to may change."""
    place = make_directory(root / "d", ALICE, 0o777)
    make_file(place / "f", ALICE, 0o666)
    make_directory(place / "sub", ALICE, 0o777)
    if not set_immutable(place, True):
        return
    attempts: list[Callable[[], object]] = [
        lambda: os.open(place / "new", os.O_CREAT | os.O_WRONLY),
        lambda: os.mkdir(place / "new"),
        lambda: os.symlink("x", place / "new"),
        lambda: os.link(place / "f", place / "new"),
        lambda: os.unlink(place / "f"),
        lambda: os.rmdir(place / "sub"),
        lambda: os.rename(place / "f", place / "g"),
        lambda: os.rename(place / "f", root / "g"),
        lambda: os.chmod(place, 0o700),
        lambda: os.rename(place, root / "e"),
        lambda: os.rmdir(place),
    ]
    try:
        for attempt in attempts:
            with refused(errno.EPERM):
                attempt()
        (place / "f").write_bytes(b"changed")
        (place / "sub" / "new").mkdir()
        with opened(place / "f", os.O_CREAT | os.O_WRONLY) as fd:
            os.write(fd, b"C")
    finally:
        set_immutable(place, False)
    os.rename(place / "f", root / "g")


@needs_root
def case_immutable_is_set_by_root(root: Path) -> None:
    path = make_file(root / "f", ALICE, 0o666)

    def attempt() -> None:
        try:
            done = set_immutable(path, True)
        except PermissionError:
            return
        assert not done, "a user may make a file immutable"

    ALICE.may(attempt)
    ALICE.may(lambda: path.write_bytes(b"still mine"))
