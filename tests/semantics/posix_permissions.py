"""POSIX cases: who may do what. See path_resolution(7), chmod(2), chown(2), unlink(2), inode(7)."""

import errno
import os
import stat
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
    opened,
)

EACCES, EPERM = errno.EACCES, errno.EPERM


def _open(path: Path, flags: int) -> None:
    os.close(os.open(path, flags))


@needs_root
def case_first_matching_class_decides(root: Path) -> None:
    """The owner has the owner's rights only, even where others have more; so has the group."""
    path = make_file(root / "f", ALICE, 0o077)
    ALICE.may_not(EACCES, lambda: _open(path, os.O_RDONLY))
    BOB.may(lambda: _open(path, os.O_RDWR))
    path.chmod(0o707)
    CAROL.may_not(EACCES, lambda: _open(path, os.O_RDONLY))  # through a supplementary group
    BOB.may(lambda: _open(path, os.O_RDWR))
    path.chmod(0o640)
    CAROL.may(lambda: _open(path, os.O_RDONLY))
    CAROL.may_not(EACCES, lambda: _open(path, os.O_WRONLY))
    BOB.may_not(EACCES, lambda: _open(path, os.O_RDONLY))


@needs_root
def case_access_mode_needs_every_right(root: Path) -> None:
    path = make_file(root / "f", ALICE, 0o200)
    ALICE.may(lambda: _open(path, os.O_WRONLY))
    ALICE.may_not(EACCES, lambda: _open(path, os.O_RDWR))
    ALICE.may_not(EACCES, lambda: _open(path, os.O_RDONLY))
    path.chmod(0o400)
    ALICE.may_not(EACCES, lambda: _open(path, os.O_RDONLY | os.O_TRUNC))
    assert path.read_bytes() == b"content"


@needs_root
def case_directory_rights(root: Path) -> None:
    """r lists, x passes, w with x changes names."""
    place = make_directory(root / "d", ALICE, 0o700)
    make_file(place / "f", ALICE, 0o666)
    place.chmod(0o400)
    ALICE.may(lambda: os.listdir(place))
    ALICE.may_not(EACCES, lambda: os.stat(place / "f"))
    place.chmod(0o100)
    ALICE.may_not(EACCES, lambda: os.listdir(place))
    ALICE.may(lambda: _open(place / "f", os.O_RDWR))
    for mode in (0o500, 0o200):
        place.chmod(mode)
        ALICE.may_not(EACCES, lambda: os.mkdir(place / "new"))
        ALICE.may_not(EACCES, lambda: os.mkfifo(place / "new"))
        ALICE.may_not(EACCES, lambda: os.symlink("x", place / "new"))
        ALICE.may_not(EACCES, lambda: _open(place / "new", os.O_CREAT | os.O_WRONLY))
        ALICE.may_not(EACCES, lambda: os.unlink(place / "f"))
        ALICE.may_not(EACCES, lambda: os.rename(place / "f", place / "g"))
    place.chmod(0o300)
    ALICE.may(lambda: os.mkdir(place / "new"))
    ALICE.may(lambda: os.unlink(place / "f"))  # whatever the file's own mode says


@needs_root
def case_existing_name_before_missing_right(root: Path) -> None:
    """What exists is EEXIST, even for those who may not write the directory."""
    place = make_directory(root / "d", ALICE, 0o755)
    make_file(place / "f", ALICE, 0o644)
    BOB.may_not(errno.EEXIST, lambda: os.mkdir(place / "f"))
    BOB.may_not(errno.EEXIST, lambda: os.symlink("x", place / "f"))
    BOB.may_not(errno.EEXIST, lambda: os.mkfifo(place / "f"))
    BOB.may_not(errno.ENOENT, lambda: os.unlink(place / "missing"))
    BOB.may(lambda: _open(place / "f", os.O_CREAT | os.O_RDONLY))


@needs_root
def case_root_passes_but_cannot_execute(root: Path) -> None:
    path = make_file(root / "f", ALICE, 0o000)
    assert path.read_bytes() == b"content"
    assert not os.access(path, os.X_OK)
    path.chmod(0o001)
    assert os.access(path, os.X_OK)
    assert os.access(make_directory(root / "d", ALICE, 0o000), os.X_OK)


@needs_root
def case_chmod_is_for_owners(root: Path) -> None:
    path = make_file(root / "f", ALICE, 0o666)
    BOB.may_not(EPERM, lambda: os.chmod(path, 0o666))
    CAROL.may_not(EPERM, lambda: os.chmod(path, 0o600))
    ALICE.may(lambda: os.chmod(path, 0o604))
    assert mode_of(path) == 0o604


@needs_root
def case_chmod_drops_foreign_set_group(root: Path) -> None:
    """The set-group-ID bit of a group that the owner is not in: dropped without a word."""
    for make in (make_file, make_directory):
        path = make(root / make.__name__, User(ALICE.uid, BOB.gid), 0o755)
        ALICE.may(lambda path=path: os.chmod(path, 0o2755))
        assert mode_of(path) == 0o755
        os.chown(path, -1, 50)  # one of her supplementary groups
        ALICE.may(lambda path=path: os.chmod(path, 0o2755))
        assert mode_of(path) == 0o2755
        os.chown(path, -1, BOB.gid)
        os.chmod(path, 0o2755)  # root may
        assert mode_of(path) == 0o2755


@needs_root
def case_chown_rules(root: Path) -> None:
    """Only root gives files away; owners choose among their groups."""
    path = make_file(root / "f", ALICE, 0o644)
    ALICE.may_not(EPERM, lambda: os.chown(path, BOB.uid, -1))
    ALICE.may_not(EPERM, lambda: os.chown(path, -1, BOB.gid))
    ALICE.may_not(EPERM, lambda: os.chown(path, BOB.uid, ALICE.gid))
    BOB.may_not(EPERM, lambda: os.chown(path, BOB.uid, -1))
    CAROL.may_not(EPERM, lambda: os.chown(path, -1, 50))
    ALICE.may(lambda: os.chown(path, -1, 50))
    assert path.stat().st_gid == 50
    ALICE.may(lambda: os.chown(path, ALICE.uid, ALICE.gid))  # nothing new for the uid
    assert (path.stat().st_uid, path.stat().st_gid) == (ALICE.uid, ALICE.gid)
    os.chown(path, ALICE.uid, BOB.gid)
    ALICE.may(lambda: os.chown(path, -1, BOB.gid))  # the group that it has already
    BOB.may(lambda: os.chown(path, -1, -1))  # nothing asked, nothing refused


@needs_root
def case_chown_takes_set_id_away(root: Path) -> None:
    """Of programs, also when root does it; of directories never."""
    path = make_file(root / "f", ALICE, 0o755)
    place = make_directory(root / "d", ALICE, 0o755)
    for target, uid, gid in ((path, BOB.uid, -1), (path, -1, 50), (path, BOB.uid, BOB.gid)):
        target.chmod(0o6755)
        os.chown(target, uid, gid)
        assert mode_of(target) == 0o755
        os.chown(target, ALICE.uid, ALICE.gid)
    path.chmod(0o6755)
    ALICE.may(lambda: os.chown(path, -1, 50))
    assert mode_of(path) == 0o755
    path.chmod(0o2745)  # without group execution it is no privilege
    os.chown(path, BOB.uid, -1)
    assert mode_of(path) == 0o2745
    place.chmod(0o6755)
    os.chown(place, BOB.uid, BOB.gid)
    assert mode_of(place) == 0o6755


@needs_root
def case_change_of_content_takes_set_id_away(root: Path) -> None:
    """write, truncate, ftruncate and O_TRUNC by those without privilege."""

    def appended() -> None:
        with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            os.write(fd, b"more")

    def cut() -> None:
        with opened(path, os.O_RDWR) as fd:
            os.ftruncate(fd, 1)

    path = make_file(root / "f", ALICE, 0o777)
    for work in (
        appended,
        cut,
        lambda: os.truncate(path, 2),
        lambda: _open(path, os.O_WRONLY | os.O_TRUNC),
    ):
        path.write_bytes(b"content")
        path.chmod(0o6777)
        ALICE.may(work)
        assert mode_of(path) == 0o777
        path.chmod(0o6777)
        work()
        assert mode_of(path) == 0o6777  # root keeps them


@needs_root
def case_new_names_in_set_group_directory(root: Path) -> None:
    place = make_directory(root / "d", User(0, BOB.gid), 0o777)
    place.chmod(0o2777)
    ALICE.may(lambda: os.mkdir(place / "sub", 0o755))
    ALICE.may(lambda: _open(place / "f", os.O_CREAT | os.O_WRONLY))
    ALICE.may(lambda: os.mkfifo(place / "fifo"))
    ALICE.may(lambda: os.symlink("f", place / "link"))
    for name in ("sub", "f", "fifo", "link"):
        assert os.lstat(place / name).st_gid == BOB.gid
    assert mode_of(place / "sub") == 0o2755
    ALICE.may(lambda: os.mknod(place / "program", stat.S_IFREG | 0o2755))
    assert mode_of(place / "program") == 0o755  # she is not in that group
    BOB.may(lambda: os.mknod(place / "own", stat.S_IFREG | 0o2755))
    assert mode_of(place / "own") == 0o2755


@needs_root
def case_sticky_directory_rules(root: Path) -> None:
    """Names go by the hand of the file's owner, the directory's owner, or root."""
    place = make_directory(root / "d", CAROL, 0o777)
    place.chmod(0o1777)
    make_file(place / "alice", ALICE, 0o666)
    make_file(place / "bob", BOB, 0o666)
    make_directory(place / "sub", ALICE, 0o777)
    BOB.may_not(EPERM, lambda: os.unlink(place / "alice"))
    BOB.may_not(EPERM, lambda: os.rmdir(place / "sub"))
    BOB.may_not(EPERM, lambda: os.rename(place / "alice", place / "x"))
    BOB.may_not(EPERM, lambda: os.rename(place / "alice", root / "x"))
    BOB.may_not(EPERM, lambda: os.rename(place / "bob", place / "alice"))
    BOB.may(lambda: os.rename(place / "bob", place / "new"))
    ALICE.may(lambda: os.unlink(place / "alice"))
    ALICE.may(lambda: os.rmdir(place / "sub"))
    CAROL.may(lambda: os.unlink(place / "new"))


@needs_root
def case_directory_that_moves_must_be_writable(root: Path) -> None:
    """rename(2): its ".." changes. Within one directory it does not."""
    one = make_directory(root / "one", ALICE, 0o755)
    two = make_directory(root / "two", ALICE, 0o755)
    make_directory(one / "sub", BOB, 0o755)
    ALICE.may_not(EACCES, lambda: os.rename(one / "sub", two / "sub"))
    ALICE.may(lambda: os.rename(one / "sub", one / "other"))
    make_file(one / "f", BOB, 0o600)
    ALICE.may(lambda: os.rename(one / "f", two / "f"))


@needs_root
def case_special_files_and_users(root: Path) -> None:
    place = make_directory(root / "d", ALICE, 0o755)
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        ALICE.may_not(
            EPERM, lambda kind=kind: os.mknod(place / "dev", kind | 0o600, os.makedev(1, 3))
        )
    for kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG):
        ALICE.may(lambda kind=kind: os.mknod(place / str(kind), kind | 0o640))
        found = (place / str(kind)).stat()
        assert (found.st_uid, found.st_mode) == (ALICE.uid, kind | 0o640)
    BOB.may_not(EACCES, lambda: _open(place / str(stat.S_IFIFO), os.O_RDONLY | os.O_NONBLOCK))


@needs_root
def case_truncate_needs_write_permission(root: Path) -> None:
    path = make_file(root / "f", ALICE, 0o444)
    ALICE.may_not(EACCES, lambda: os.truncate(path, 0))
    BOB.may_not(EACCES, lambda: os.truncate(path, 0))
    path.chmod(0o646)
    BOB.may(lambda: os.truncate(path, 3))
    assert path.read_bytes() == b"con"


@needs_root
def case_umask_of_the_caller(root: Path) -> None:
    place = make_directory(root / "d", ALICE, 0o755)

    def make() -> None:
        os.umask(0o137)
        _open_new(place / "f", 0o777)
        os.mkdir(place / "sub", 0o777)
        os.mknod(place / "fifo", stat.S_IFIFO | 0o777)

    ALICE.may(make)
    assert [mode_of(place / name) for name in ("f", "sub", "fifo")] == [0o640] * 3


def _open_new(path: Path, mode: int) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, mode))
