"""What concerns files as a whole: registering, syncing, second names, holes."""

import ctypes
import os
from collections.abc import Sequence

from hf3fs_py_usrbio._library import MOUNT_POINT_BYTES, error, lib

_RANGES_MAX = 1000


def extract_mount_point(path: str) -> str | None:
    """Return the mount point that `path` lies on, None if it is none of ours.

    Raises RuntimeError if there is no such path.
    """
    if not os.path.exists(path):
        raise RuntimeError(f"{path}: no such file or directory")
    encoded = os.fsencode(path)
    size = MOUNT_POINT_BYTES
    while True:
        found = ctypes.create_string_buffer(size)
        needed: int = lib.hf3fs_extract_mount_point(found, size, encoded)
        if needed < 0:
            return None
        if needed <= size:
            return os.fsdecode(found.value)
        size = needed


def register_fd(fd: int, flags: int = 0) -> None:
    """Let rings use an open file. Raises OSError: EBADF if it is none of ours, EINVAL if done."""
    problem = lib.hf3fs_reg_fd(fd, flags)
    if problem > 0:
        raise error(problem)


def deregister_fd(fd: int) -> None:
    """Forget a file, before it is closed; I/O under way goes on. Never raises."""
    lib.hf3fs_dereg_fd(fd)


def force_fsync(fd: int) -> int:
    """Make what was written durable, and the length exact for everybody. Returns 0 or -1."""
    try:
        os.fsync(fd)
    except (OSError, ValueError):  # ValueError: a negative number
        return -1
    return 0


def hardlink(target: str, link_name: str) -> None:
    """Give a file a second name. Raises OSError."""
    problem = lib.hf3fs_hardlink(os.fsencode(target), os.fsencode(link_name))
    if problem:
        raise error(problem)


def _punch(fd: int, start: Sequence[int], end: Sequence[int], flags: int) -> None:
    numbers = ctypes.c_size_t * len(start)
    problem = lib.hf3fs_punchhole(fd, len(start), numbers(*start), numbers(*end), flags)
    if problem:
        raise error(problem)


# 3FS has two functions of this name, told apart by the type and name of the first argument.
def punch_hole(
    file: int | str | None = None,
    start: Sequence[int] = (),
    end: Sequence[int] = (),
    flags: int = 0,
    *,
    filename: str | None = None,
    fd: int | None = None,
) -> None:
    """Make the ranges [start[i], end[i]) of a file, in bytes, read as zeros; its length stays.

    Give a path (`filename`) or a descriptor (`fd`) that is open for writing. Raises RuntimeError if
    there are not as many starts as ends, or above 1000; OSError EINVAL for a start behind its end.
    """
    given = [each for each in (file, filename, fd) if each is not None]
    if len(given) != 1:
        raise TypeError("punch_hole needs a path (filename) or a descriptor (fd), and only one")
    if len(start) != len(end) or len(start) > _RANGES_MAX:
        raise RuntimeError("size not equal")
    if min((*start, *end), default=0) < 0:
        raise TypeError("starts and ends are 0 or more bytes")
    target = given[0]
    if isinstance(target, int):
        _punch(target, start, end, flags)
        return
    opened = os.open(target, os.O_RDWR | os.O_CLOEXEC)
    try:
        _punch(opened, start, end, flags)
    finally:
        os.close(opened)
