"""POSIX cases: listings that stay right while names come and go."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path


def case_listing(root: Path) -> None:
    names = {f"n{index:05d}" for index in range(700)}
    for name in names:
        (root / name).write_bytes(b"")
    (root / "sub").mkdir()
    assert set(os.listdir(root)) == names | {"sub"}
    assert len(os.listdir(root)) == 701
    for entry in os.scandir(root):
        assert entry.is_dir() == (entry.name == "sub")
        assert entry.inode() == os.lstat(entry.path).st_ino


def case_listing_contains_dots(root: Path) -> None:
    (root / "sub").mkdir()
    names = [name for name, _ in _entries(root / "sub")]
    assert sorted(names) == [b".", b".."]


def case_listing_under_change(root: Path) -> None:
    """Names that stay are listed exactly once, whatever comes and goes meanwhile."""
    stay = {b"k%05d" % index for index in range(0, 1200, 2)}
    for name in stay:
        (root / os.fsdecode(name)).write_bytes(b"")
    seen = []
    for number, (name, _) in enumerate(_entries(root)):
        seen.append(name)
        if number % 7 == 0 and number < 1000:
            (root / f"k{(number * 2 + 1) % 1200:05d}").write_bytes(b"")
        if number % 11 == 0:
            with contextlib.suppress(FileNotFoundError):
                (root / f"k{(number * 2 + 13) % 1200 | 1:05d}").unlink()
    assert stay <= set(seen)
    assert len(seen) == len(set(seen))


def case_seek_in_listing(root: Path) -> None:
    """telldir and seekdir, and rewinddir that sees what is new."""
    for index in range(600):
        (root / f"n{index:04d}").write_bytes(b"")
    libc = _libc()
    stream = libc.opendir(bytes(root))
    try:
        order, places = [], []
        while name := _next_name(libc, stream):
            order.append(name)
            places.append(libc.telldir(stream))
        (root / "n0000a").write_bytes(b"")
        for index in (500, 10, 300, 0, 598):
            libc.seekdir(stream, places[index])
            assert _next_name(libc, stream) in (order[index + 1], b"n0000a")
        libc.rewinddir(stream)
        again = set()
        while name := _next_name(libc, stream):
            again.add(name)
        assert again == set(order) | {b"n0000a"}
    finally:
        libc.closedir(stream)


def case_remove_while_listing(root: Path) -> None:
    """What rm -r does: read, remove, read on."""
    for index in range(1000):
        (root / f"n{index}").write_bytes(b"")
    for name, _ in _entries(root):
        if name not in (b".", b".."):
            os.unlink(os.path.join(os.fsencode(root), name))
    assert os.listdir(root) == []


class _Dirent(ctypes.Structure):
    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = ctypes.c_void_p
    libc.readdir.restype = ctypes.POINTER(_Dirent)
    libc.telldir.restype = ctypes.c_long
    libc.readdir.argtypes = libc.telldir.argtypes = [ctypes.c_void_p]
    libc.rewinddir.argtypes = libc.closedir.argtypes = [ctypes.c_void_p]
    libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
    return libc


def _next_name(libc: ctypes.CDLL, stream: int) -> bytes:
    while found := libc.readdir(stream):
        if found.contents.d_name not in (b".", b".."):
            return found.contents.d_name
    return b""


def _entries(path: Path) -> Iterator[tuple[bytes, int]]:
    libc = _libc()
    stream = libc.opendir(bytes(path))
    assert stream, os.strerror(ctypes.get_errno())
    try:
        while found := libc.readdir(stream):
            yield bytes(found.contents.d_name), found.contents.d_ino
    finally:
        libc.closedir(stream)
