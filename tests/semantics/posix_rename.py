"""POSIX cases: rename(2) over everything, with and without its flags, and the link counts."""

import errno
import itertools
import os
import shutil
import stat
from pathlib import Path

from semantics.posix_tools import (
    ALICE,
    BOB,
    EXCHANGE,
    NOREPLACE,
    make_directory,
    make_file,
    needs_root,
    refused,
    rename2,
)

KINDS = ("missing", "file", "link", "fifo", "empty", "full")
_DIRECTORIES = ("empty", "full")


def _make(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_bytes(b"content")
    elif kind == "link":
        os.symlink("nowhere", path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind in _DIRECTORIES:
        path.mkdir()
        if kind == "full":
            (path / "inside").write_bytes(b"")


def _rule(source: str, target: str, flags: int) -> int:
    """The errno of rename(2), 0 for success."""
    if source == "missing":
        return errno.ENOENT
    if flags & NOREPLACE:
        return 0 if target == "missing" else errno.EEXIST
    if flags & EXCHANGE:
        return errno.ENOENT if target == "missing" else 0
    if target == "missing":
        return 0
    if source in _DIRECTORIES and target not in _DIRECTORIES:
        return errno.ENOTDIR
    if source not in _DIRECTORIES and target in _DIRECTORIES:
        return errno.EISDIR
    return errno.ENOTEMPTY if target == "full" else 0


def _inode(path: Path) -> int:
    return os.lstat(path).st_ino if os.path.lexists(path) else 0


def case_rename_of_every_kind_over_every_kind(root: Path) -> None:
    for source, target, flags in itertools.product(KINDS, KINDS, (0, NOREPLACE, EXCHANGE)):
        for across in (False, True):
            place = root / "p"
            other = place / "other" if across else place
            other.mkdir(parents=True)
            one, two = place / "one", other / "two"
            _make(one, source)
            _make(two, target)
            before = _inode(one), _inode(two)
            expected = _rule(source, target, flags)
            if expected:
                with refused(expected):
                    rename2(one, two, flags)
                assert (_inode(one), _inode(two)) == before
            else:
                rename2(one, two, flags)
                left = before[1] if flags & EXCHANGE else 0
                assert (_inode(one), _inode(two)) == (left, before[0])
            _check_counts(place)
            shutil.rmtree(place)


def _check_counts(place: Path) -> None:
    """A directory has two links and one for every directory in it."""
    for directory in (place, *(p for p in place.rglob("*") if stat.S_ISDIR(os.lstat(p).st_mode))):
        inside = sum(entry.is_dir(follow_symlinks=False) for entry in os.scandir(directory))
        assert os.lstat(directory).st_nlink == 2 + inside, directory
        assert os.path.samefile(directory / "..", directory.parent)


def case_rename_below_and_above_itself(root: Path) -> None:
    (root / "a" / "b" / "c").mkdir(parents=True)
    for target in (root / "a" / "x", root / "a" / "b", root / "a" / "b" / "c" / "x"):
        with refused(errno.EINVAL):
            os.rename(root / "a", target)
    for target in (root / "a" / "b", root / "a" / "b" / "c"):
        with refused(errno.EINVAL):
            rename2(root / "a", target, EXCHANGE)
        with refused(errno.EINVAL):
            rename2(target, root / "a", EXCHANGE)
    for source in (root / "a" / "b" / "c", root / "a" / "b"):
        with refused(errno.ENOTEMPTY):
            os.rename(source, root / "a")
    _check_counts(root)


def case_rename_to_itself(root: Path) -> None:
    (root / "f").write_bytes(b"f")
    (root / "d").mkdir()
    for path in (root / "f", root / "d"):
        os.rename(path, path)
        rename2(path, path, EXCHANGE)
        with refused(errno.EEXIST):
            rename2(path, path, NOREPLACE)
    os.link(root / "f", root / "g")
    os.rename(root / "f", root / "g")  # two names of one file stay
    assert (root / "f").stat().st_nlink == 2
    with refused(errno.EEXIST):
        rename2(root / "f", root / "g", NOREPLACE)


def case_rename_flags_that_contradict(root: Path) -> None:
    (root / "a").write_bytes(b"")
    (root / "b").write_bytes(b"")
    for flags in (NOREPLACE | EXCHANGE, 1 << 10):
        with refused(errno.EINVAL):
            rename2(root / "a", root / "b", flags)


def case_rename_of_dots(root: Path) -> None:
    (root / "d").mkdir()
    for source, target in (("d/.", "x"), ("d/..", "x"), ("d", "d/."), ("d", "d/..")):
        with refused(errno.EBUSY, errno.EINVAL, errno.ENOTEMPTY):
            os.rename(f"{root}/{source}", f"{root}/{target}")


def case_rename_with_a_slash_behind(root: Path) -> None:
    (root / "f").write_bytes(b"")
    (root / "d").mkdir()
    with refused(errno.ENOTDIR):
        os.rename(root / "f", f"{root}/g/")
    with refused(errno.ENOTDIR):
        os.rename(f"{root}/f/", root / "g")
    os.rename(f"{root}/d/", f"{root}/e/")
    assert (root / "e").is_dir()


def case_rename_of_a_link_moves_the_link(root: Path) -> None:
    (root / "f").write_bytes(b"f")
    os.symlink("f", root / "link")
    os.rename(root / "link", root / "moved")
    assert os.readlink(root / "moved") == "f"
    (root / "g").write_bytes(b"g")
    os.rename(root / "g", root / "moved")  # replaces the link, not what it leads to
    assert (root / "f").read_bytes() == b"f"
    assert not (root / "moved").is_symlink()


def case_rename_drops_one_link_of_the_replaced(root: Path) -> None:
    (root / "a").write_bytes(b"a")
    (root / "b").write_bytes(b"b")
    os.link(root / "b", root / "c")
    os.rename(root / "a", root / "b")
    assert (root / "c").stat().st_nlink == 1
    assert (root / "b").stat().st_nlink == 1
    assert (root / "c").read_bytes() == b"b"


@needs_root
def case_exchange_needs_rights_on_both_sides(root: Path) -> None:
    one = make_directory(root / "one", ALICE, 0o755)
    two = make_directory(root / "two", ALICE, 0o755)
    make_file(one / "f", BOB, 0o600)
    make_directory(two / "d", BOB, 0o755)
    ALICE.may_not(errno.EACCES, lambda: rename2(one / "f", two / "d", EXCHANGE))
    BOB.may_not(errno.EACCES, lambda: rename2(one / "f", two / "d", EXCHANGE))
    os.chown(two / "d", ALICE.uid, -1)
    ALICE.may(lambda: rename2(one / "f", two / "d", EXCHANGE))
    assert (one / "d").is_dir() if (one / "d").exists() else (one / "f").is_dir()
    one.chmod(0o1777)
    os.chown(one / "f", BOB.uid, -1)
    os.chown(one, 0, -1)
    ALICE.may_not(errno.EPERM, lambda: rename2(one / "f", two / "d", EXCHANGE))


def case_across_file_systems(root: Path) -> None:
    elsewhere = Path("/dev/shm") / f"emberfs-{os.getpid()}"
    if not elsewhere.parent.is_dir() or elsewhere.parent.stat().st_dev == root.stat().st_dev:
        return
    (root / "f").write_bytes(b"")
    with refused(errno.EXDEV):
        os.rename(root / "f", elsewhere)
    with refused(errno.EXDEV):
        os.link(root / "f", elsewhere)
