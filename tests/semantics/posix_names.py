"""POSIX cases: names, links, renames."""

import errno
import os
import stat
from pathlib import Path

from semantics.posix_tools import EXCHANGE, NOREPLACE, needs_root, opened, refused, rename2


def case_create_exclusive(root: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with opened(root / "f", flags):
        pass
    with refused(errno.EEXIST):
        os.open(root / "f", flags)
    os.symlink("nowhere", root / "link")
    with refused(errno.EEXIST):
        os.open(root / "link", flags)


def case_open_errors(root: Path) -> None:
    (root / "f").write_bytes(b"")
    (root / "d").mkdir()
    with refused(errno.ENOENT):
        os.open(root / "missing", os.O_RDONLY)
    with refused(errno.ENOENT):
        os.open(root / "missing" / "f", os.O_WRONLY | os.O_CREAT)
    with refused(errno.ENOTDIR):
        os.open(root / "f" / "x", os.O_RDONLY)
    with refused(errno.EISDIR):
        os.open(root / "d", os.O_WRONLY)
    with refused(errno.ENOTDIR):
        os.open(root / "f", os.O_RDONLY | os.O_DIRECTORY)
    os.symlink("f", root / "link")
    with refused(errno.ELOOP):
        os.open(root / "link", os.O_RDONLY | os.O_NOFOLLOW)


def case_names_of_any_bytes(root: Path) -> None:
    names = [b"space d", b"\xff\xfe", "\u00e4\u4e2d".encode(), b"-rf", b"new\nline", b"a" * 255]
    for name in names:
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(name)
    assert sorted(os.listdir(os.fsencode(root))) == sorted(names)
    for name in names:
        with open(os.path.join(os.fsencode(root), name), "rb") as file:
            assert file.read() == name


def case_name_too_long(root: Path) -> None:
    for attempt in (
        lambda: (root / ("a" * 256)).write_bytes(b""),
        lambda: os.mkdir(root / ("a" * 256)),
        lambda: os.stat(root / ("a" * 256)),
        lambda: os.symlink("x", root / ("a" * 256)),
    ):
        with refused(errno.ENAMETOOLONG):
            attempt()


def case_mkdir_and_rmdir(root: Path) -> None:
    links = root.stat().st_nlink
    (root / "d").mkdir(mode=0o755)
    assert stat.S_ISDIR((root / "d").stat().st_mode)
    assert (root / "d").stat().st_nlink == 2
    assert root.stat().st_nlink == links + 1
    with refused(errno.EEXIST):
        os.mkdir(root / "d")
    (root / "d" / "f").write_bytes(b"")
    with refused(errno.ENOTEMPTY, errno.EEXIST):
        os.rmdir(root / "d")
    with refused(errno.ENOTDIR):
        os.rmdir(root / "d" / "f")
    with refused(errno.EISDIR, errno.EPERM):
        os.unlink(root / "d")
    (root / "d" / "f").unlink()
    os.rmdir(root / "d")
    assert root.stat().st_nlink == links
    with refused(errno.ENOENT):
        os.rmdir(root / "d")


def case_removed_directory_is_empty(root: Path) -> None:
    (root / "d").mkdir()
    with opened(root / "d", os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.rmdir(root / "d")
        assert os.listdir(fd) == []
        with refused(errno.ENOENT):
            os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd)


def case_symlinks(root: Path) -> None:
    (root / "d").mkdir()
    (root / "d" / "f").write_bytes(b"content")
    os.symlink("d/f", root / "relative")
    os.symlink(str(root / "d"), root / "absolute")
    os.symlink("missing", root / "dangling")
    os.symlink("circle", root / "circle")
    assert os.readlink(root / "relative") == "d/f"
    assert (root / "relative").read_bytes() == b"content"
    assert (root / "absolute" / "f").read_bytes() == b"content"
    assert stat.S_ISLNK(os.lstat(root / "relative").st_mode)
    assert os.lstat(root / "relative").st_size == 3
    with refused(errno.ENOENT):
        (root / "dangling").stat()
    with refused(errno.ELOOP):
        (root / "circle").stat()
    with refused(errno.EINVAL):
        os.readlink(root / "d" / "f")
    with refused(errno.EEXIST):
        os.symlink("x", root / "relative")
    long = "x/" * 2000
    os.symlink(long, root / "long")
    assert os.readlink(root / "long") == long
    (root / "relative").unlink()
    assert (root / "d" / "f").exists()


def case_hard_links(root: Path) -> None:
    (root / "a").write_bytes(b"one")
    os.link(root / "a", root / "b")
    assert (root / "a").stat().st_nlink == 2
    assert (root / "a").stat().st_ino == (root / "b").stat().st_ino
    (root / "b").write_bytes(b"two!")
    assert (root / "a").read_bytes() == b"two!"
    with refused(errno.EEXIST):
        os.link(root / "a", root / "b")
    with refused(errno.EPERM):
        os.link(root, root / "c")
    (root / "a").unlink()
    assert (root / "b").stat().st_nlink == 1
    assert (root / "b").read_bytes() == b"two!"


def case_rename_replaces(root: Path) -> None:
    (root / "a").write_bytes(b"a")
    (root / "b").write_bytes(b"b")
    number = (root / "a").stat().st_ino
    os.rename(root / "a", root / "b")
    assert (root / "b").read_bytes() == b"a"
    assert (root / "b").stat().st_ino == number
    assert os.listdir(root) == ["b"]


def case_rename_rules(root: Path) -> None:
    (root / "d" / "e").mkdir(parents=True)
    (root / "full").mkdir()
    (root / "full" / "f").write_bytes(b"")
    (root / "f").write_bytes(b"")
    with refused(errno.EISDIR):
        os.rename(root / "f", root / "d")
    with refused(errno.ENOTDIR):
        os.rename(root / "d", root / "f")
    with refused(errno.ENOTEMPTY, errno.EEXIST):
        os.rename(root / "d", root / "full")
    with refused(errno.EINVAL):
        os.rename(root / "d", root / "d" / "e" / "x")
    with refused(errno.ENOENT):
        os.rename(root / "missing", root / "x")
    with refused(errno.ENOENT):
        os.rename(root / "f", root / "missing" / "x")
    os.rename(root / "f", root / "f")
    os.link(root / "f", root / "same")
    os.rename(root / "f", root / "same")  # two names of one inode: nothing happens
    assert (root / "f").exists()


def case_rename_directory_between_parents(root: Path) -> None:
    (root / "a" / "d").mkdir(parents=True)
    (root / "b").mkdir()
    (root / "a" / "d" / "f").write_bytes(b"x")
    os.rename(root / "a" / "d", root / "b" / "e")
    assert (root / "b" / "e" / "f").read_bytes() == b"x"
    assert (root / "a").stat().st_nlink == 2
    assert (root / "b").stat().st_nlink == 3
    assert os.path.samefile(root / "b" / "e" / "..", root / "b")
    (root / "c").mkdir()
    os.rename(root / "b" / "e", root / "c")  # over an empty directory
    assert (root / "c" / "f").exists()


def case_rename_noreplace_and_exchange(root: Path) -> None:
    (root / "a").write_bytes(b"a")
    (root / "d").mkdir()
    (root / "d" / "b").write_bytes(b"b")
    with refused(errno.EEXIST):
        rename2(root / "a", root / "d", NOREPLACE)
    rename2(root / "a", root / "c", NOREPLACE)
    assert not (root / "a").exists()
    rename2(root / "c", root / "d" / "b", EXCHANGE)
    assert (root / "c").read_bytes() == b"b"
    assert (root / "d" / "b").read_bytes() == b"a"
    rename2(root / "c", root / "d", EXCHANGE)
    assert (root / "c" / "b").read_bytes() == b"a"
    assert (root / "d").read_bytes() == b"b"
    with refused(errno.ENOENT):
        rename2(root / "c", root / "missing", EXCHANGE)


def case_special_files(root: Path) -> None:
    os.mkfifo(root / "fifo", 0o600)
    assert stat.S_ISFIFO((root / "fifo").stat().st_mode)
    reader = os.open(root / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with opened(root / "fifo", os.O_WRONLY) as writer:
        os.write(writer, b"through")
        assert os.read(reader, 10) == b"through"
    os.close(reader)
    os.mknod(root / "plain", stat.S_IFREG | 0o644)
    assert (root / "plain").read_bytes() == b""
    os.mknod(root / "socket", stat.S_IFSOCK | 0o644)
    assert stat.S_ISSOCK((root / "socket").stat().st_mode)


@needs_root
def case_device_numbers(root: Path) -> None:
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    found = (root / "null").stat()
    assert stat.S_ISCHR(found.st_mode)
    assert found.st_rdev == os.makedev(1, 3)
