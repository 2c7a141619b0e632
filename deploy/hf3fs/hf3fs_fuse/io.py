"""Batched I/O on files of a mount, with the names and meanings that programs of 3FS know.

A program registers descriptors, describes shared memory as buffers (`make_iovec`), and moves bytes
between both through rings (`make_ioring`). Failures are OSError with errno.
"""

import os
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import hf3fs_py_usrbio
from hf3fs_py_usrbio import (
    deregister_fd,
    extract_mount_point,
    force_fsync,
    hardlink,
    punch_hole,
    register_fd,
)

__all__ = [
    "IorPriority",
    "deregister_fd",
    "extract_mount_point",
    "force_fsync",
    "hardlink",
    "ioring",
    "iovec",
    "make_ioring",
    "make_iovec",
    "punch_hole",
    "read_file",
    "register_fd",
]

_DEFAULT_BLOCK_BYTES = 1 << 30
_MEMORY = "/dev/shm"


class IorPriority:
    """Priorities of a ring. Accepted everywhere; rings made from Python are of normal priority."""

    HIGH = -1
    NORMAL = 0
    LOW = 1


class iovec:  # noqa: N801
    """A buffer (`iov`) with the link that tells others where its memory is (`link`)."""

    def __init__(self, iov: hf3fs_py_usrbio.iovec, link: str) -> None:
        self.iov = iov
        self.link = link
        self._pid = os.getpid()

    def __getitem__(self, s: slice) -> hf3fs_py_usrbio.iovec:
        """The part of a slice, as what rings take."""
        return self.iov[s]

    def __setitem__(self, s: slice, value: object) -> None:
        """Raise TypeError: bytes are written through the shared memory itself."""
        self.iov[s] = value  # type: ignore[index]

    def __del__(self) -> None:
        """Take the link away, except in a forked child: it is the parent's."""
        if os.getpid() == self._pid:
            os.unlink(self.link)


class ioring:  # noqa: N801
    """A ring that takes buffers of both kinds."""

    def __init__(self, ior: hf3fs_py_usrbio.ioring) -> None:
        self.ior = ior

    @staticmethod
    def size_for_entries(entries: int) -> int:
        """Bytes that a ring for so many entries takes."""
        return hf3fs_py_usrbio.ioring.size_for_entries(entries)

    def prepare(
        self,
        iov: "iovec | hf3fs_py_usrbio.iovec",
        read: bool,
        fd: int,
        off: int,
        userdata: object = None,
    ) -> hf3fs_py_usrbio.ioring:
        """Note an I/O; see hf3fs_py_usrbio.ioring, which is what it returns."""
        native = iov.iov if isinstance(iov, iovec) else iov
        return self.ior.prepare(native, read, fd, off, userdata)

    def submit(self) -> hf3fs_py_usrbio.ioring:
        """Start what was prepared."""
        return self.ior.submit()

    def wait(
        self,
        *,
        max_results: int = 0,
        min_results: int = 0,
        timeout: timedelta | float | None = None,
    ) -> list[hf3fs_py_usrbio.iovec]:
        """Hand back what is finished; see hf3fs_py_usrbio.ioring."""
        return self.ior.wait(max_results=max_results, min_results=min_results, timeout=timeout)


def _link_directory(hf3fs_mount_point: str) -> str:
    """Where the link of a buffer goes; the C library follows the same rule (native/names.c)."""
    usual = os.path.join(hf3fs_mount_point, "3fs-virt", "iovs")
    if os.path.isdir(usual) or not os.path.exists(hf3fs_mount_point):
        return usual
    if extract_mount_point(hf3fs_mount_point) is None:
        return usual  # the symlink there fails and says so
    own = f"{_MEMORY}/emberfs-hf3fs-{os.geteuid()}"
    os.makedirs(own, mode=0o700, exist_ok=True)
    status = os.lstat(own)
    if status.st_uid != os.geteuid() or os.path.islink(own) or status.st_mode & 0o022:
        raise PermissionError(1, "not trusted: it must be a directory of yours alone", own)
    return own


def make_iovec(
    shm: SharedMemory, hf3fs_mount_point: str, block_size: int = 0, numa: int = -1
) -> iovec:
    """Make a buffer of shared memory, whose name may be unlinked at once afterwards.

    Raises OSError if its link cannot be made, ValueError for memory that is closed.
    """
    memory = shm.buf
    if memory is None:
        raise ValueError(f"{shm.name}: this shared memory is closed")
    name = str(uuid.uuid4())
    suffix = f".b{block_size}" if block_size > 0 else ""
    link = os.path.join(_link_directory(hf3fs_mount_point), name + suffix)
    os.symlink(os.path.normpath(f"{_MEMORY}/{shm.name}"), link)
    try:
        native = hf3fs_py_usrbio.iovec(memory, name, hf3fs_mount_point, block_size, numa)
    except BaseException:
        os.unlink(link)
        raise
    return iovec(native, link)


def make_ioring(
    hf3fs_mount_point: str,
    entries: int,
    for_read: bool = True,
    io_depth: int = 0,
    priority: int | None = None,
    timeout: int | None = None,
    numa: int = -1,
    flags: int = 0,
) -> ioring:
    """Make a ring for up to `entries` I/Os at a time; `timeout` in milliseconds. Raises OSError."""
    return ioring(
        hf3fs_py_usrbio.ioring(
            hf3fs_mount_point, entries, for_read, io_depth, priority, timeout, numa, flags
        )
    )


def read_file(
    fn: str,
    hf3fs_mount_point: str | None = None,
    block_size: int = _DEFAULT_BLOCK_BYTES,
    off: int = 0,
    priority: int | None = None,
    cb: Callable[[memoryview, int], Any] | None = None,
) -> bytes | None:
    """Read a file from byte `off` to its end, in blocks of `block_size` bytes of shared memory.

    Without `cb` returns the bytes. With it, calls cb(block, offset) for each: a returned int is the
    offset to go on from, anything else that is true ends it. Raises OSError for a failed read.
    """
    mount_point = extract_mount_point(fn) if hf3fs_mount_point is None else hf3fs_mount_point
    if mount_point is None:
        raise OSError(f"{fn}: not on a mount of emberfs; open it as an ordinary file")
    fd = os.open(fn, os.O_RDONLY | os.O_CLOEXEC)
    try:
        register_fd(fd)
        try:
            shm = SharedMemory(create=True, size=block_size)
            try:
                return _read_blocks(shm, fd, mount_point, off, priority, cb)
            finally:
                shm.close()
                shm.unlink()
        finally:
            deregister_fd(fd)
    finally:
        os.close(fd)


def _read_blocks(
    shm: SharedMemory,
    fd: int,
    mount_point: str,
    off: int,
    priority: int | None,
    cb: Callable[[memoryview, int], Any] | None,
) -> bytes | None:
    iov = make_iovec(shm, mount_point)
    ring = make_ioring(mount_point, 1, True, 0, priority)
    memory = shm.buf
    assert memory is not None
    blocks: list[bytes] = []
    while True:
        ring.prepare(iov, True, fd, off)
        got = ring.submit().wait(min_results=1)[0].result
        if got < 0:
            raise OSError(-got)
        if got == 0:
            break
        answer = None
        with memory[:got] as block:  # released also when cb fails, or close() would fail
            if cb is None:
                blocks.append(bytes(block))
            else:
                answer = cb(block, off)
        if isinstance(answer, int) and not isinstance(answer, bool):
            off = answer
            continue
        if answer or got < shm.size:
            break
        off += got
    return b"".join(blocks) if cb is None else None
