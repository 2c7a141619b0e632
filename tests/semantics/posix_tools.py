"""What the POSIX cases stand on: expected errors, descriptors, other users, renameat2."""

import contextlib
import ctypes
import errno
import functools
import os
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

Case = Callable[[Path], None]

KiB, MiB = 1 << 10, 1 << 20
NOREPLACE, EXCHANGE = 1, 2


@contextlib.contextmanager
def open_place() -> Iterator[Path]:
    """A directory that every user reaches; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="emberfs-posix-", ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)
        yield Path(name)


def needs_root(case: Case) -> Case:
    """Mark a case that changes owners or users."""
    case.needs_root = True
    return case


@contextlib.contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """The block must fail with one of these errnos."""
    try:
        yield
    except OSError as problem:
        names = [errno.errorcode[number] for number in numbers]
        assert problem.errno in numbers, f"{problem} instead of {names}"  # noqa: PT017
    else:
        raise AssertionError(f"nothing was refused; expected {errno.errorcode[numbers[0]]}")


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes without a short period, so that a misplaced block shows."""
    words = (length + 3) // 4
    return b"".join((index * 2654435761 + seed & 0xFFFFFFFF).to_bytes(4, "little")
                    for index in range(words))[:length]  # fmt: skip


def rename2(source: Path, target: Path, flags: int) -> None:
    """renameat2(2), which Python does not offer."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, bytes(source), -100, bytes(target), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source))


def as_user(uid: int, gid: int, groups: list[int], script: str, *arguments: object) -> str:
    """Run Python code as somebody else and return what it prints.

    In a forked child rather than a new interpreter: that one may lie where others cannot read it.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as report:
            os._exit(_become_and_run(uid, gid, groups, script, list(map(str, arguments)), report))
    os.close(writing)
    with os.fdopen(reading) as report:
        said = report.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, said
    return said.strip()


class User(NamedTuple):
    """Somebody; `do` runs a function as them, in a forked child whose assertions count here."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def do(self, work: Callable[[], object]) -> None:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as report:
                try:
                    os.setgroups(self.groups)
                    os.setgid(self.gid)
                    os.setuid(self.uid)
                    os.umask(0o022)
                    work()
                except BaseException:
                    report.write(traceback.format_exc())
                    report.flush()
                    os._exit(1)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as report:
            said = report.read()
        _, status = os.waitpid(child, 0)
        assert status == 0, said

    def may(self, work: Callable[[], object]) -> None:
        """It must succeed for them."""
        self.do(work)

    def may_not(self, number: int, work: Callable[[], object]) -> None:
        """It must fail for them with this errno."""

        def attempt() -> None:
            with refused(number):
                work()

        self.do(attempt)


ALICE = User(1234, 1234, (50,))
BOB = User(2345, 2345)
CAROL = User(3456, 3456, (50, 1234))


def make_file(path: Path, user: User, mode: int, content: bytes = b"content") -> Path:
    """A file of somebody."""
    path.write_bytes(content)
    os.chown(path, user.uid, user.gid)
    path.chmod(mode)
    return path


def make_directory(path: Path, user: User, mode: int) -> Path:
    """A directory of somebody."""
    path.mkdir()
    os.chown(path, user.uid, user.gid)
    path.chmod(mode)
    return path


def mode_of(path: Path) -> int:
    """Permission bits, links not followed."""
    return stat.S_IMODE(os.lstat(path).st_mode)


def _become_and_run(
    uid: int, gid: int, groups: list[int], script: str, arguments: list[str], report: TextIO
) -> int:
    try:
        os.setgroups(groups)
        os.setgid(gid)
        os.setuid(uid)
        os.umask(0o022)
        said = functools.partial(print, file=report)
        exec(script, {"os": os, "argv": ["", *arguments], "print": said})
    except BaseException:
        report.write(traceback.format_exc())
        report.flush()
        return 1
    report.flush()
    return 0
