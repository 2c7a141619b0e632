"""An application's connection to the client daemon of a mount, and what it has registered there."""

import errno
import os
import socket
import threading
from bisect import bisect_right
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias

from emberfs.client import mountpoint
from emberfs.client.native import messages
from emberfs.client.native._ring import address
from emberfs.client.native.messages import Kind, Request
from emberfs.fabric.region import Region, Slice
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import MiB

SOCKET = ".emberfs/ring"  # below the root of a mount
ANSWER_TIMEOUT_S = 30.0
IDLE_BYTES_MIN, IDLE_BYTES_MAX = 1 * MiB, 128 * MiB  # memory that is kept for `borrow`

# A Slice of a Region, a Region, or whatever memoryview() accepts; contiguous.
Memory: TypeAlias = Any


class HasFileno(Protocol):
    """An open file of any kind."""

    def fileno(self) -> int:
        """Its descriptor."""
        ...


def mount_of(path: str | os.PathLike[str]) -> str:
    """The emberfs mount that a path is on. FileNotFoundError if it is on none."""
    where = Path(path).resolve()
    for mount in reversed(mountpoint.mounts()):
        if mount.kind == "fuse.emberfs" and where.is_relative_to(mount.path):
            return mount.path
    raise FileNotFoundError(errno.ENOENT, "not on an emberfs mount", str(path))


class RegisteredFile:
    """A file that entries can name. Close it before the descriptor."""

    def __init__(self, connection: "Connection", number: int) -> None:
        self._connection = connection
        self.number = number
        self.closed = False

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Let the daemon forget the file; entries that name it fail from now on."""
        if not self.closed:
            self.closed = True
            self._connection.forget(Kind.FORGET_FILE, self.number)


class Connection:
    """Registers memory, files and rings with the daemon. Any number of threads may use it."""

    def __init__(self, mount: str | os.PathLike[str]) -> None:
        """Connect to the daemon of an emberfs mount (any path on it will do). Raises OSError."""
        self.mount = mount_of(mount)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self.numbers: dict[int, int] = {}  # by Region.id
        self._starts: list[int] = []  # addresses of the regions, sorted
        self._regions: list[Region] = []  # in the same order
        self._idle: list[Region] = []  # of `borrow`
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.socket.settimeout(ANSWER_TIMEOUT_S)
            self.socket.connect(os.readlink(Path(self.mount) / SOCKET))
            version = self.ask(Request(Kind.HELLO, messages.VERSION))
            if version != messages.VERSION:
                raise OSError(errno.EPROTO, f"the daemon speaks version {version} of the rings")
        except OSError as problem:
            self.socket.close()
            text = f'{self.mount}: no rings here ({problem.strerror}); is `rings` set to ""?'
            raise type(problem)(problem.errno, text) from None

    # ------------------------------------------------------------ asking

    def ask(self, request: Request) -> int:
        """Send a request; the value of its answer. Raises OSError."""
        value, fds = self.ask_for(request, 0)
        assert not fds
        return value

    def ask_for(self, request: Request, count: int) -> tuple[int, list[int]]:
        """As `ask`, for an answer with `count` descriptors, which are the caller's then."""
        if os.getpid() != self._pid:
            raise RuntimeError("a connection does not survive fork: make one in the child")
        with self._lock:
            try:
                self.socket.send(messages.encode_request(request), socket.MSG_NOSIGNAL)
                message, fds, _, _ = socket.recv_fds(
                    self.socket, messages.MESSAGE_BYTES_MAX, messages.FDS_MAX,
                    socket.MSG_CMSG_CLOEXEC,
                )  # fmt: skip
            except TimeoutError:
                self.socket.close()  # an answer that comes late would be taken for the next
                raise
            except OSError as problem:
                raise _gone(problem.strerror) from None
        try:
            if not message:
                raise _gone("it has closed the connection")
            answer = messages.decode_answer(message)
            if answer.error:
                raise OSError(answer.error, f"{os.strerror(answer.error)} ({answer.words})")
            if len(fds) != count:
                raise OSError(errno.EMFILE, f"{len(fds)} of {count} descriptors have arrived")
        except (OSError, EmberfsError) as problem:
            for fd in fds:
                os.close(fd)
            if isinstance(problem, EmberfsError):
                raise OSError(errno.EPROTO, problem.message) from None
            raise
        return answer.value, fds

    def forget(self, kind: Kind, number: int) -> None:
        """Ask to forget something; nothing to do when the daemon is gone, it has forgotten all."""
        try:
            self.ask(Request(kind, number))
        except OSError:
            pass

    # ------------------------------------------------------------ memory

    def region(self, size_bytes: int) -> Region:
        """Allocate memory (rounded up to pages) that the daemon can fill. Raises OSError."""
        number, (fd,) = self.ask_for(Request(Kind.REGION, size_bytes), 1)
        region = Region.adopt(fd)
        start = address(region.view)[0]
        with self._lock:
            self.numbers[region.id] = number
            place = bisect_right(self._starts, start)
            self._starts.insert(place, start)
            self._regions.insert(place, region)
        region.watchers.add(self._closed)
        return region

    def borrow(self, size_bytes: int) -> Region:
        """Memory for a moment; see give_back. Its content is whatever was there."""
        with self._lock:
            fitting = [region for region in self._idle if region.size_bytes >= size_bytes]
            if fitting:
                found = min(fitting, key=lambda region: region.size_bytes)
                self._idle.remove(found)
                return found
        return self.region(max(IDLE_BYTES_MIN, 1 << (size_bytes - 1).bit_length()))

    def give_back(self, region: Region, *, usable: bool) -> None:
        """Keep borrowed memory for the next one, unless there is enough or it is not `usable`."""
        with self._lock:
            idle_bytes = sum(one.size_bytes for one in self._idle)
            if usable and idle_bytes + region.size_bytes <= IDLE_BYTES_MAX:
                self._idle.append(region)
                return
        region.close()

    def _closed(self, region_id: int) -> None:
        with self._lock:
            number = self.numbers.pop(region_id, None)
            for place, region in enumerate(self._regions):
                if region.id == region_id:
                    del self._regions[place], self._starts[place]
                    break
        if number is not None and os.getpid() == self._pid:
            self.forget(Kind.FORGET_REGION, number)

    def find(self, memory: Memory) -> Slice | None:
        """The part of a region that any object's buffer is; None if it lies elsewhere."""
        if isinstance(memory, Region):
            memory = memory.slice(0, memory.size_bytes)
        if isinstance(memory, Slice):
            return memory if memory.region.id in self.numbers else None
        start, length, _ = address(memory)
        place = bisect_right(self._starts, start) - 1
        if place >= 0:
            offset, region = start - self._starts[place], self._regions[place]
            if offset + length <= region.size_bytes:
                return Slice(region, offset, length)
        return None

    # ------------------------------------------------------------ files

    def file(self, file: int | HasFileno) -> RegisteredFile:
        """Register a file that is open on the mount. OSError: EBADF if it is on another.

        Close what is returned before the descriptor.
        """
        fd = file if isinstance(file, int) else file.fileno()
        return RegisteredFile(self, self.ask(Request(Kind.FILE, fd)))

    # ------------------------------------------------------------ the end

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Disconnect: rings end, the daemon forgets files and memory. Regions stay mapped here."""
        for region in list(self._regions):
            region.watchers.discard(self._closed)
        self.numbers.clear()
        self._regions.clear()
        self._starts.clear()
        self.socket.close()
        for region in self._idle:
            region.close()
        self._idle.clear()


def _gone(why: str | None) -> OSError:
    return OSError(errno.ENOTCONN, f"the client daemon is gone ({why}); open files and rings anew")
