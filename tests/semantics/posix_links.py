"""POSIX cases: hard links, long names and paths, loops, special files, races for a name."""

import contextlib
import ctypes
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from semantics.posix_tools import needs_root, opened, refused

RACERS = 6


def case_hard_links_to_every_kind(root: Path) -> None:
    (root / "file").write_bytes(b"x")
    os.symlink("file", root / "link")
    os.mkfifo(root / "fifo")
    for name in ("file", "link", "fifo"):
        os.link(root / name, root / f"{name}2", follow_symlinks=False)
        one, two = os.lstat(root / name), os.lstat(root / f"{name}2")
        assert (one.st_ino, one.st_nlink) == (two.st_ino, 2)
        assert one.st_mode == two.st_mode
    assert os.readlink(root / "link2") == "file"
    (root / "d").mkdir()
    with refused(errno.EPERM):
        os.link(root / "d", root / "d2")
    with refused(errno.ENOENT):
        os.link(root / "missing", root / "x")
    with refused(errno.EEXIST):
        os.link(root / "file", root / "link")
    with refused(errno.ENOTDIR):
        os.link(root / "file", root / "file" / "x")


def case_link_count_goes_up_and_down(root: Path) -> None:
    (root / "f").write_bytes(b"x")
    for index in range(20):
        os.link(root / "f", root / f"l{index}")
        assert (root / "f").stat().st_nlink == index + 2
    with opened(root / "f", os.O_RDWR) as fd:
        (root / "f").unlink()
        for index in range(20):
            assert os.fstat(fd).st_nlink == 20 - index
            (root / f"l{index}").unlink()
        assert os.fstat(fd).st_nlink == 0
        os.write(fd, b"still")
        with refused(errno.ENOENT):
            _link_descriptor(fd, root / "back")


def _link_descriptor(fd: int, path: Path) -> None:
    """linkat(2) with AT_SYMLINK_FOLLOW, the way to give an open file a name."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.linkat(-100, b"/proc/self/fd/%d" % fd, -100, bytes(path), 0x400):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))


def case_longest_names_and_paths(root: Path) -> None:
    long, longer = "n" * 255, "n" * 256
    (root / long).write_bytes(b"x")
    os.rename(root / long, root / ("m" * 255))
    os.link(root / ("m" * 255), root / long)
    os.symlink(long, root / ("s" * 255))
    assert (root / ("s" * 255)).read_bytes() == b"x"
    (root / "f").write_bytes(b"")
    attempts: list[Callable[[], object]] = [
        lambda: os.rename(root / "f", root / longer),
        lambda: os.rename(root / longer, root / "f"),
        lambda: os.link(root / "f", root / longer),
        lambda: os.unlink(root / longer),
        lambda: os.rmdir(root / longer),
        lambda: os.mkfifo(root / longer),
        lambda: os.chmod(root / longer, 0),
        lambda: os.truncate(root / longer, 0),
        lambda: os.open(root / longer, os.O_CREAT | os.O_WRONLY),
        lambda: os.stat(str(root) + "/." * 2048),
        lambda: os.symlink("x" * 4096, root / "link"),
    ]
    for attempt in attempts:
        with refused(errno.ENAMETOOLONG):
            attempt()
    with refused(errno.ENOENT):
        os.symlink("", root / "link")


def case_chains_of_links(root: Path) -> None:
    """path_resolution(7): forty links are followed, one more is a loop."""
    (root / "l0").write_bytes(b"end")
    for index in range(1, 42):
        os.symlink(f"l{index - 1}", root / f"l{index}")
    assert (root / "l40").read_bytes() == b"end"
    with refused(errno.ELOOP):
        (root / "l41").read_bytes()
    os.symlink("two", root / "one")
    os.symlink("one", root / "two")
    for attempt in (
        lambda: os.stat(root / "one"),
        lambda: os.open(root / "one", os.O_CREAT | os.O_WRONLY),
        lambda: os.mkdir(root / "one" / "d"),
        lambda: os.chmod(root / "two", 0o600),
        lambda: os.truncate(root / "two", 0),
        lambda: os.rename(root / "l0", root / "one" / "x"),
    ):
        with refused(errno.ELOOP):
            attempt()
    os.unlink(root / "one")


def case_dots_are_not_removed(root: Path) -> None:
    (root / "d" / "e").mkdir(parents=True)
    with refused(errno.EINVAL):
        os.rmdir(f"{root}/d/.")
    with refused(errno.ENOTEMPTY):
        os.rmdir(f"{root}/d/e/..")
    with refused(errno.EISDIR, errno.EPERM):
        os.unlink(f"{root}/d/.")
    with refused(errno.EEXIST):
        os.mkdir(f"{root}/d/.")
    with refused(errno.EEXIST):
        os.mkdir(f"{root}/d/..")


def case_file_is_no_directory(root: Path) -> None:
    (root / "f").write_bytes(b"")
    inside = root / "f" / "x"
    attempts: list[Callable[[], object]] = [
        lambda: os.stat(inside),
        lambda: os.mkdir(inside),
        lambda: os.symlink("x", inside),
        lambda: os.mkfifo(inside),
        lambda: os.unlink(inside),
        lambda: os.rmdir(inside),
        lambda: os.rename(inside, root / "y"),
        lambda: os.rename(root / "f", inside),
        lambda: os.open(inside, os.O_CREAT | os.O_WRONLY),
        lambda: os.listdir(root / "f"),
        lambda: os.rmdir(root / "f"),
        lambda: os.open(f"{root}/f/", os.O_RDONLY),
    ]
    for attempt in attempts:
        with refused(errno.ENOTDIR):
            attempt()


@needs_root
def case_devices_keep_their_numbers(root: Path) -> None:
    for index, (kind, major, minor) in enumerate(
        ((stat.S_IFCHR, 1, 3), (stat.S_IFBLK, 259, 1), (stat.S_IFCHR, 4095, (1 << 20) - 1))
    ):
        path = root / f"dev{index}"
        os.mknod(path, kind | 0o640, os.makedev(major, minor))
        found = os.lstat(path)
        assert found.st_mode == kind | 0o640
        assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == (major, minor)
        os.rename(path, root / "moved")
        assert os.lstat(root / "moved").st_rdev == found.st_rdev
    with refused(errno.EINVAL, errno.EPERM):
        os.mknod(root / "odd", 0o030000 | 0o600)
    with refused(errno.EINVAL, errno.EPERM):
        os.mknod(root / "dir", stat.S_IFDIR | 0o700)


def case_sockets_and_fifos_work(root: Path) -> None:
    here = os.getcwd()
    os.chdir(root)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind("s")
            server.listen()
            assert stat.S_ISSOCK(os.lstat("s").st_mode)
            client.connect("s")
            with refused(errno.EADDRINUSE), socket.socket(socket.AF_UNIX) as other:
                other.bind("s")
        with refused(errno.ENXIO):
            os.open("s", os.O_RDONLY)
        os.mkfifo("fifo")
        with refused(errno.ENXIO):
            os.open("fifo", os.O_WRONLY | os.O_NONBLOCK)
        with refused(errno.EINVAL):
            os.truncate("fifo", 0)
    finally:
        os.chdir(here)


def _race(attempt: Callable[[int], object]) -> list[int]:
    """Many processes at once; the exit status of each is the errno, 0 for who succeeded."""
    children = []
    reading, writing = os.pipe()
    for index in range(RACERS):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # returns when the starter closes its end
            status = 0
            try:
                attempt(index)
            except OSError as problem:
                status = problem.errno or 255
            os._exit(status)
        children.append(child)
    os.close(reading)
    os.close(writing)
    return sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def case_one_of_many_wins(root: Path) -> None:
    """O_EXCL, mkdir, symlink, link: the others find the name taken."""
    (root / "f").write_bytes(b"")
    exclusive = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    attempts: list[Callable[[Path, int], object]] = [
        lambda path, _: os.open(path, exclusive),
        lambda path, _: os.mkdir(path),
        lambda path, index: os.symlink(str(index), path),
        lambda path, _: os.link(root / "f", path),
    ]
    for number, attempt in enumerate(attempts):
        for turn in range(5):
            path = root / f"{number}-{turn}"
            statuses = _race(lambda index, a=attempt, p=path: a(p, index))
            assert statuses == [0] + [errno.EEXIST] * (RACERS - 1)


def case_one_of_many_removes(root: Path) -> None:
    for turn in range(5):
        path = root / f"f{turn}"
        path.write_bytes(b"")
        assert _race(lambda _, p=path: os.unlink(p)) == [0] + [errno.ENOENT] * (RACERS - 1)
        path.mkdir()
        assert _race(lambda _, p=path: os.rmdir(p)) == [0] + [errno.ENOENT] * (RACERS - 1)
        path.write_bytes(b"")
        moved = _race(lambda index, p=path: os.rename(p, root / f"to{index}"))
        assert moved == [0] + [errno.ENOENT] * (RACERS - 1)


def case_a_replaced_name_is_never_missing(root: Path) -> None:
    """Who looks while rename replaces finds the old one or the new one."""
    path = root / "f"
    path.write_bytes(b"0" * 10)

    def work(index: int) -> None:
        if index == 0:
            for turn in range(60):
                fresh = root / "fresh"
                fresh.write_bytes(b"%d" % (turn % 10) * 10)
                os.rename(fresh, path)
        else:
            for _ in range(60):
                data = path.read_bytes()
                if len(data) != 10 or len(set(data)) != 1:
                    raise OSError(errno.EIO, f"torn: {data!r}")

    assert _race(work) == [0] * RACERS


def case_open_without_exclusive_races_make_one_file(root: Path) -> None:
    for turn in range(5):
        path = root / f"f{turn}"

        def write(index: int, path: Path = path) -> None:
            with opened(path, os.O_CREAT | os.O_WRONLY) as fd:
                os.pwrite(fd, b"%d" % index, index)

        assert _race(write) == [0] * RACERS
        assert path.read_bytes() == b"012345"


def case_rmdir_races_create(root: Path) -> None:
    """Either the directory is removed, or the name is made: never a name in nothing."""
    for turn in range(10):
        place = root / f"d{turn}"
        place.mkdir()

        def work(index: int, place: Path = place) -> None:
            if index % 2:
                os.rmdir(place)
            else:
                os.close(os.open(place / f"f{index}", os.O_CREAT | os.O_WRONLY))

        statuses = _race(work)
        if place.exists():
            assert statuses.count(errno.ENOTEMPTY) == RACERS // 2
            assert len(os.listdir(place)) == RACERS // 2
        else:
            with contextlib.suppress(FileNotFoundError):
                assert os.listdir(place) == []
            assert statuses.count(0) == 1
