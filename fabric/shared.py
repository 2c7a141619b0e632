"""Regions of callers as a server on the same host maps them.

A descriptor that arrives over the socket is hostile until shown otherwise: it must be a memfd that
can never shrink (or an access would raise SIGBUS and kill the server, memfd_create(2)) and has
the size that was announced.
"""

import mmap
import os
from collections import deque

from emberfs.fabric.frame import Registration
from emberfs.fabric.region import SHARED_BYTES_MAX, sealed_bytes
from emberfs.proto.errors import Code, EmberfsError

REGIONS_MAX = 1024  # per connection; each costs a descriptor


def inode_of(fd: int) -> int:
    """Return the inode of an open file: it names a memfd among others."""
    return os.fstat(fd).st_ino


class RegionTable:
    """What one caller has registered, by its region ids."""

    def __init__(self) -> None:
        self.views: dict[int, memoryview] = {}  # by region id
        self._refused: dict[int, str] = {}
        self._bytes = 0  # of all views

    def register(self, registration: Registration, fds: deque[int]) -> None:
        """Map a region with the descriptor that came with it. A refusal shows when it is used."""
        fd = _claim(registration, fds)
        try:
            if registration.region in self.views:
                raise ValueError("it is registered already")
            if len(self.views) >= REGIONS_MAX:
                raise ValueError(f"the limit is {REGIONS_MAX} regions")
            if self._bytes + registration.size_bytes > SHARED_BYTES_MAX:
                raise ValueError(f"the limit is {SHARED_BYTES_MAX} bytes in all regions")
            self.views[registration.region] = _map(registration, fd)
            self._bytes += registration.size_bytes
        except (ValueError, OSError) as problem:
            if len(self._refused) < REGIONS_MAX:
                self._refused[registration.region] = str(problem)
        finally:
            if fd >= 0:
                os.close(fd)

    def unregister(self, region: int) -> None:
        """Forget a region; handlers that still use it keep it mapped."""
        view = self.views.pop(region, None)
        self._bytes -= len(view) if view is not None else 0
        self._refused.pop(region, None)

    def view(self, region: int, offset: int, length: int) -> memoryview:
        """Return a part of a region. INVALID when it is unknown or does not reach that far."""
        whole = self.views.get(region)
        if whole is None:
            why = self._refused.get(region, "it was never registered")
            raise EmberfsError(Code.INVALID, f"region {region} is not available: {why}")
        if offset + length > len(whole):
            raise EmberfsError(
                Code.INVALID,
                f"[{offset}, {offset + length}) is outside region {region} of {len(whole)} bytes",
            )
        return whole[offset : offset + length]

    def clear(self) -> None:
        """Forget everything."""
        self.views.clear()
        self._bytes = 0
        self._refused.clear()


def _claim(registration: Registration, fds: deque[int]) -> int:
    """Find the descriptor of a registration; those before it belong to nothing."""
    while fds:
        fd = fds.popleft()
        try:
            if inode_of(fd) == registration.inode:
                return fd
        except OSError:
            pass
        os.close(fd)
    return -1


def _map(registration: Registration, fd: int) -> memoryview:
    if fd < 0:
        raise ValueError("its descriptor did not arrive (too many open files?)")
    if sealed_bytes(fd) != registration.size_bytes:
        raise ValueError("it does not have the announced size")
    return memoryview(mmap.mmap(fd, registration.size_bytes))
