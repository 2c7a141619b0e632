"""EmberfsError as the OSError that Python programs expect, with the path and the code kept."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from emberfs.proto.errors import Code, EmberfsError


class FileSystemError(OSError):
    """An operation on an emberfs path failed; also an instance of the built-in of its errno."""

    code: Code = Code.INTERNAL


class _NotFoundError(FileSystemError, FileNotFoundError):
    pass


class _ExistsError(FileSystemError, FileExistsError):
    pass


class _IsDirectoryError(FileSystemError, IsADirectoryError):
    pass


class _NotDirectoryError(FileSystemError, NotADirectoryError):
    pass


class _PermissionError(FileSystemError, PermissionError):
    pass


class _TimeoutError(FileSystemError, TimeoutError):
    pass


_CLASSES: dict[int, type[FileSystemError]] = {
    errno.ENOENT: _NotFoundError,
    errno.EEXIST: _ExistsError,
    errno.EISDIR: _IsDirectoryError,
    errno.ENOTDIR: _NotDirectoryError,
    errno.EACCES: _PermissionError,
    errno.EPERM: _PermissionError,
    errno.ETIMEDOUT: _TimeoutError,
}


def os_error(problem: EmberfsError, path: bytes | None = None) -> FileSystemError:
    """Translate; `path` is what the application asked for."""
    make = _CLASSES.get(problem.errno, FileSystemError)
    text = f"{os.strerror(problem.errno)} ({problem})"
    error = make(problem.errno, text, os.fsdecode(path) if path is not None else None)
    error.code = problem.code
    return error


@contextmanager
def translated(path: bytes | None = None) -> Iterator[None]:
    """Raise what happens inside as FileSystemError."""
    try:
        yield
    except EmberfsError as problem:
        raise os_error(problem, path) from problem
