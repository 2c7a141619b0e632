"""POSIX cases: what moves atime, mtime and ctime. See inode(7) and utimensat(2)."""

import contextlib
import ctypes
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from semantics.posix_tools import (
    ALICE,
    BOB,
    make_file,
    needs_root,
    opened,
    refused,
)

NOW, OMIT = (1 << 30) - 1, (1 << 30) - 2  # UTIME_NOW, UTIME_OMIT


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def utimensat(path: Path, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """utimensat(2) with seconds and nanoseconds, which Python hides."""
    libc = ctypes.CDLL(None, use_errno=True)
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    if libc.utimensat(-100, bytes(path), times, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))


@contextlib.contextmanager
def _moves(path: Path, *names: str) -> Iterator[None]:
    """Of mtime and ctime the block must move these and no other."""
    before = os.lstat(path)
    time.sleep(0.012)  # the clock of a local file system ticks coarsely
    yield
    after = os.lstat(path)
    moved = [n for n in ("mtime", "ctime") if _stamp(after, n) > _stamp(before, n)]
    assert moved == list(names), f"{path.name}: {moved} moved instead of {names}"


def _stamp(found: os.stat_result, name: str) -> int:
    return getattr(found, f"st_{name}_ns")


def case_times_of_a_changed_file(root: Path) -> None:
    path = root / "f"
    path.write_bytes(b"content")

    def write() -> None:
        with opened(path, os.O_WRONLY) as fd:
            os.write(fd, b"x")

    both = ("mtime", "ctime")
    steps: list[tuple[Callable[[], object], tuple[str, ...]]] = [
        (write, both),
        (lambda: os.truncate(path, 3), both),
        (lambda: os.truncate(path, 30), both),
        (lambda: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)), both),
        (lambda: os.chmod(path, 0o600), ("ctime",)),
        (lambda: os.chown(path, -1, -1) or os.chown(path, os.getuid(), -1), ("ctime",)),
        (lambda: os.link(path, root / "g"), ("ctime",)),
        (lambda: os.unlink(root / "g"), ("ctime",)),
        (lambda: os.rename(path, root / "h") or os.rename(root / "h", path), ("ctime",)),
        (path.read_bytes, ()),
        (path.stat, ()),
    ]
    for work, names in steps:
        with _moves(path, *names):
            work()


def case_times_of_a_changed_directory(root: Path) -> None:
    place, other = root / "d", root / "e"
    place.mkdir()
    other.mkdir()
    (root / "f").write_bytes(b"")
    steps: list[Callable[[], object]] = [
        lambda: (place / "f").write_bytes(b""),
        lambda: os.mkdir(place / "sub"),
        lambda: os.mkfifo(place / "fifo"),
        lambda: os.symlink("x", place / "link"),
        lambda: os.link(root / "f", place / "hard"),
        lambda: os.rename(place / "f", place / "g"),
        lambda: os.rename(place / "g", other / "g"),
        lambda: os.rename(other / "g", place / "g"),
        lambda: os.unlink(place / "g"),
        lambda: os.rmdir(place / "sub"),
    ]
    for work in steps:
        with _moves(place, "mtime", "ctime"):
            work()
    with _moves(place):
        os.chmod(place / "fifo", 0o600)
        os.listdir(place)
    with _moves(root / "f"):
        (place / "link").unlink()


def case_times_stay_after_a_refusal(root: Path) -> None:
    place = root / "d"
    (place / "full").mkdir(parents=True)
    (place / "full" / "f").write_bytes(b"")
    (root / "f").write_bytes(b"")
    attempts: list[tuple[int, Callable[[], object]]] = [
        (errno.EEXIST, lambda: os.mkdir(place / "full")),
        (errno.EEXIST, lambda: os.symlink("x", place / "full")),
        (errno.ENOTEMPTY, lambda: os.rmdir(place / "full")),
        (errno.ENOENT, lambda: os.unlink(place / "missing")),
        (errno.EISDIR, lambda: os.rename(root / "f", place / "full")),
        (errno.ENOTDIR, lambda: os.rmdir(place / "full" / "f")),
    ]
    for number, work in attempts:
        with _moves(place), _moves(place / "full"), refused(number):
            work()


def case_ctime_of_what_loses_its_place(root: Path) -> None:
    """A replaced file's other name, and a directory that moves."""
    (root / "a").write_bytes(b"a")
    (root / "b").write_bytes(b"b")
    os.link(root / "b", root / "c")
    with _moves(root / "c", "ctime"):
        os.rename(root / "a", root / "b")
    assert (root / "c").stat().st_nlink == 1
    (root / "d" / "e").mkdir(parents=True)
    with _moves(root / "d" / "e", "ctime"):
        os.rename(root / "d" / "e", root / "e")
        os.rename(root / "e", root / "d" / "e")


def case_utime_now_and_omit(root: Path) -> None:
    path = root / "f"
    path.write_bytes(b"")
    utimensat(path, (1_000_000_001, 123_456_789), (1_000_000_002, 987_654_321))
    found = path.stat()
    assert found.st_atime_ns == 1_000_000_001_123_456_789
    assert found.st_mtime_ns == 1_000_000_002_987_654_321
    utimensat(path, (0, OMIT), (5, 7))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (found.st_atime_ns, 5_000_000_007)
    utimensat(path, (6, 8), (0, OMIT))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (6_000_000_008, 5_000_000_007)
    with _moves(path):
        utimensat(path, (0, OMIT), (0, OMIT))
    utimensat(path, (0, NOW), (9, 9))
    assert path.stat().st_atime > 1_000_000_000
    assert path.stat().st_mtime_ns == 9_000_000_009
    utimensat(path, (9, 9), (0, NOW))
    assert path.stat().st_atime_ns == 9_000_000_009
    assert abs(path.stat().st_mtime - time.time()) < 5
    with refused(errno.EINVAL):
        utimensat(path, (1, 1_000_000_000), (1, 0))


def case_times_of_far_years(root: Path) -> None:
    """Before 1970, after 2038, and within a second on both sides of zero."""
    path = root / "f"
    path.write_bytes(b"")
    for seconds in (-1_000_000_000, -1, 0, 1, 5_000_000_000, 9_000_000_000):
        utimensat(path, (seconds, 5), (seconds, 999_999_999))
        wanted = seconds * 1_000_000_000
        assert path.stat().st_atime_ns == wanted + 5
        # The last nanosecond before 1970 means the clock on our wire: it becomes the one before.
        assert 0 <= wanted + 999_999_999 - path.stat().st_mtime_ns <= (seconds == -1)


@needs_root
def case_who_may_set_times(root: Path) -> None:
    path = make_file(root / "f", ALICE, 0o666)
    BOB.may(lambda: os.utime(path))  # now, as whoever may write
    BOB.may(lambda: utimensat(path, (0, OMIT), (0, OMIT)))
    BOB.may_not(errno.EPERM, lambda: os.utime(path, (1, 1)))
    BOB.may_not(errno.EPERM, lambda: utimensat(path, (0, NOW), (0, OMIT)))
    BOB.may_not(errno.EPERM, lambda: utimensat(path, (0, OMIT), (0, NOW)))
    path.chmod(0o644)
    BOB.may_not(errno.EACCES, lambda: os.utime(path))
    path.chmod(0o000)
    ALICE.may(lambda: os.utime(path))
    ALICE.may(lambda: os.utime(path, (1, 1)))
    assert path.stat().st_mtime == 1


@needs_root
def case_touch_moves_the_clock_for_writers(root: Path) -> None:
    path = make_file(root / "f", ALICE, 0o666)
    os.utime(path, (1, 1))
    BOB.may(lambda: os.utime(path))
    assert abs(path.stat().st_mtime - time.time()) < 5
