"""Rings: prepare I/O, submit it, wait for results."""

import ctypes
import itertools
import os
from datetime import timedelta
from time import CLOCK_REALTIME, clock_gettime_ns
from typing import Self

from hf3fs_py_usrbio._buffers import iovec
from hf3fs_py_usrbio._library import Cqe, Ior, Timespec, check, error, lib

_S_IN_NS = 1_000_000_000
_ROUND_NS = 500_000_000
_FOREVER_S = 1e9  # a generation; beyond it the clock's numbers end


def _deadline_ns(timeout: timedelta | float | None) -> int | None:
    """The time of CLOCK_REALTIME at which a wait ends, None if never."""
    if timeout is None:
        return None
    if isinstance(timeout, timedelta):
        seconds = timeout.total_seconds()
    elif isinstance(timeout, float):
        seconds = timeout
    else:
        raise TypeError(
            f"timeout is a timedelta or a float of seconds, not {type(timeout).__name__}"
        )
    if seconds >= _FOREVER_S:
        return None
    return _now_ns() + int(max(seconds, 0.0) * _S_IN_NS)


def _now_ns() -> int:
    return clock_gettime_ns(CLOCK_REALTIME)  # the clock of the C interface


class ioring:  # noqa: N801
    """I/O in one direction: up to `entries` prepared and not yet handed back."""

    def __init__(
        self,
        hf3fs_mount_point: str,
        entries: int,
        for_read: bool = True,
        io_depth: int = 0,
        priority: int | None = None,
        timeout: int | None = None,
        numa: int = -1,
        flags: int = 0,
    ) -> None:
        """Make a ring; `timeout` in milliseconds. Raises OSError: EINVAL, ENOENT, ENOTSUP."""
        self._ior = Ior()
        self._at = ctypes.addressof(self._ior)
        self._entries = entries
        self._for_read = for_read
        # By token: the object and its userdata, from prepare() to wait().
        self._pending: dict[int, tuple[iovec, object]] = {}
        self._tokens = itertools.count(1)
        mount_point = os.fsencode(hf3fs_mount_point)
        milliseconds = 0 if timeout is None else timeout
        check(
            lib.hf3fs_iorcreate4(
                self._at, mount_point, entries, for_read, io_depth, milliseconds, numa, flags
            )
        )

    @staticmethod
    def size_for_entries(entries: int) -> int:
        """Bytes that a ring for so many entries takes."""
        size: int = lib.hf3fs_ior_size(entries)
        return size

    @property
    def entries(self) -> int:
        """How many were asked for."""
        return self._entries

    def prepare(self, iov: iovec, read: bool, fd: int, off: int, userdata: object = None) -> Self:
        """Note an I/O between all of `iov` and the file at byte `off`.

        Raises OSError: EINVAL (direction, empty), EBADF (not registered), EACCES (not opened for
        it), EAGAIN (full: wait first).
        """
        if not isinstance(iov, iovec):
            raise TypeError(f"an iovec is needed, not {type(iov).__name__}")
        if off < 0:
            raise error(22)
        token = next(self._tokens)
        self._pending[token] = (iov, userdata)
        index = lib.hf3fs_prep_io(
            self._at,
            ctypes.addressof(iov._root),
            read,
            iov._address,
            fd,
            off,
            iov._length,
            token,
        )
        if index < 0:
            del self._pending[token]
            raise error(-index)
        return self

    def submit(self) -> Self:
        """Start what was prepared."""
        check(lib.hf3fs_submit_ios(self._at))
        return self

    def wait(
        self,
        *,
        max_results: int = 0,
        min_results: int = 0,
        timeout: timedelta | float | None = None,
    ) -> list[iovec]:
        """Wait until `min_results` are there or the time is over, and hand them back.

        Up to `max_results` that are ready then come along, in the order of completion. With neither
        given it looks for one and does not wait. A time that is over is no error.
        """
        deadline_ns = _deadline_ns(timeout)
        most = max(max_results, min_results)
        if most <= 0:
            most, min_results = 1, 0
        cqes = (Cqe * min(most, max(self._entries, 1)))()
        found: list[iovec] = []
        while True:
            # In rounds: handlers of signals run in between (Ctrl-C), and more results than a ring
            # holds are gathered while another thread prepares.
            until_ns = _now_ns() + _ROUND_NS
            if deadline_ns is not None:
                until_ns = min(until_ns, deadline_ns)
            least = max(0, min_results - len(found))
            found += self._reap(cqes, most - len(found), least, until_ns)
            if len(found) >= min_results:
                return found
            if deadline_ns is not None and _now_ns() >= deadline_ns:
                return found

    def _reap(self, cqes: "ctypes.Array[Cqe]", most: int, least: int, until_ns: int) -> list[iovec]:
        room = min(most, len(cqes))
        until = Timespec(*divmod(until_ns, _S_IN_NS))
        count = check(
            lib.hf3fs_wait_for_ios(self._at, cqes, room, min(least, room), ctypes.addressof(until))
        )
        return [self._finish(cqe) for cqe in cqes[:count]]

    def _finish(self, cqe: Cqe) -> iovec:
        iov, userdata = self._pending.pop(cqe.userdata)
        iov._result, iov._userdata = cqe.result, userdata
        return iov

    def destroy(self) -> None:
        """End the ring; I/O under way is waited for. Calling it again does nothing."""
        lib.hf3fs_iordestroy(self._at)
        self._pending.clear()

    def __del__(self) -> None:
        """End the ring, unless making it failed."""
        if getattr(self, "_at", None) is not None and lib is not None:
            lib.hf3fs_iordestroy(self._at)
