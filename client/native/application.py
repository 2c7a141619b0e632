"""One application of the daemon: its connection, what it has given, and its rings."""

import logging
import socket
import stat
from collections.abc import Awaitable, Callable

from emberfs.client.native import messages
from emberfs.client.native._ring import identify
from emberfs.client.native.holdings import Holdings, errno_of
from emberfs.client.native.layout import Submission
from emberfs.client.native.messages import Answer, Kind, Request, RingTerms
from emberfs.client.native.performer import Completion, Performer, Tell
from emberfs.client.native.scheduler import PRIORITIES, Scheduler
from emberfs.client.native.sharedring import SharedRing
from emberfs.fabric.region import Region
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND

log = logging.getLogger("emberfs.client.native")

RINGS_MAX = 256
GATHER_US_MAX = SECOND // 1000
_BELL_BYTES = 4096  # more than one ring of the bell at a time is taken off the socket


class AttachedRing:
    """A ring that is served (see scheduler.Served), with its bell: one end of a socket pair."""

    def __init__(
        self,
        ring: SharedRing,
        terms: RingTerms,
        bell: socket.socket,
        perform: Callable[[list[Submission], Tell], Awaitable[None]],
        broken: Callable[[str], None],
    ) -> None:
        self.terms = terms
        self.bell = bell
        self._ring = ring
        self._perform = perform
        self._broken = broken
        self.closed = False

    def waiting(self) -> int:
        """How many entries can be taken; 0 when the ring is of no use any more."""
        if self.closed:
            return 0
        try:
            return self._ring.waiting()
        except EmberfsError as problem:
            self._broken(problem.message)
            return 0

    def take(self, count: int) -> list[Submission]:
        """Take up to so many entries."""
        if not self.waiting():
            return []
        self._ring.wake()
        return self._ring.take(count)

    async def perform(self, entries: list[Submission]) -> None:
        """Do what they say; tell as they are done."""
        await self._perform(entries, self._tell)

    def sleep(self) -> bool:
        """Ask for the bell; False if entries wait already."""
        try:
            return self.closed or self._ring.sleep()
        except EmberfsError as problem:
            self._broken(problem.message)
            return True

    def _tell(self, completions: list[Completion]) -> None:
        if not self.closed and self._ring.tell(completions):
            ring_bell(self.bell)

    def heard(self) -> bool:
        """Take the rings of the bell off the socket; False when its other end is gone."""
        try:
            return bool(self.bell.recv(_BELL_BYTES, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Tell nothing any more."""
        if not self.closed:
            self.closed = True
            self._ring.close()
            self.bell.close()


def ring_bell(bell: socket.socket) -> None:
    """Wake the other side. A full socket wakes it as well, and one that is gone needs nothing."""
    try:
        bell.send(b"\1", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        pass


class Application:
    """Answers the requests of one connection. The event loop calls; nothing here waits."""

    def __init__(
        self,
        connection: socket.socket,
        holdings: Holdings,
        scheduler: Scheduler,
        performer: Performer,
        close_fd: Callable[[int], None],
        watch: Callable[[socket.socket, Callable[[], None]], None],
        unwatch: Callable[[socket.socket], None],
        gone: Callable[["Application"], None],
    ) -> None:
        """`watch` has a function called when a socket is readable, `unwatch` ends that."""
        self._connection = connection
        self._holdings = holdings
        self._scheduler = scheduler
        self._performer = performer
        self._close_fd = close_fd
        self._watch = watch
        self._unwatch = unwatch
        self._gone = gone
        self._rings: dict[int, AttachedRing] = {}
        self._last = 0
        self._greeted = False
        self.closed = False
        watch(connection, self._readable)

    def _readable(self) -> None:
        try:
            message, fds, flags, _ = socket.recv_fds(
                self._connection,
                messages.MESSAGE_BYTES_MAX,
                messages.FDS_MAX,
                socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            return
        except OSError:
            message, fds, flags = b"", [], 0
        if not message:
            for fd in fds:
                self._close_fd(fd)
            self.close("")
            return
        if flags & socket.MSG_CTRUNC:  # too many, or no descriptor was left for them
            for fd in fds:
                self._close_fd(fd)
            fds = []
        self._send(self._answered(message, fds))

    def _answered(self, message: bytes, fds: list[int]) -> Answer:
        try:
            request = messages.decode_request(message)
            wanted = _FDS.get(request.kind, 0)
            if len(fds) != wanted:
                text = f"{request.kind.name} takes {wanted} descriptors, {len(fds)} came"
                raise EmberfsError(Code.INVALID, text)
            if not self._greeted and request.kind != Kind.HELLO:
                raise EmberfsError(Code.INVALID, "HELLO comes first")
            given, fds = fds, []
            return Answer(0, self._perform(request, given))
        except EmberfsError as problem:
            return Answer(errno_of(problem), 0, problem.message)
        finally:
            for fd in fds:
                self._close_fd(fd)

    def _perform(self, request: Request, fds: list[int]) -> int:
        holdings, number = self._holdings, request.first
        match request.kind:
            case Kind.HELLO:
                self._greeted = True
                return messages.VERSION
            case Kind.REGION:
                return holdings.add_region(fds[0], request.first)
            case Kind.FORGET_REGION:
                holdings.remove_region(number)
            case Kind.FILE:
                return holdings.add_file(fds[0])
            case Kind.FORGET_FILE:
                holdings.remove_file(number)
            case Kind.RING:
                return self._add_ring(messages.unpack_terms(request), fds[0], fds[1])
            case Kind.FORGET_RING:
                self._remove_ring(number)
        return 0

    # ------------------------------------------------------------ rings

    def _add_ring(self, terms: RingTerms, memory_fd: int, bell_fd: int) -> int:
        bell: socket.socket | None = None
        memory: Region | None = None
        try:
            if len(self._rings) >= RINGS_MAX:
                raise EmberfsError(Code.INVALID, f"at most {RINGS_MAX} rings")
            if not (terms.priority < PRIORITIES and terms.gather_us <= GATHER_US_MAX):
                raise EmberfsError(
                    Code.INVALID, f"priority 0 to {PRIORITIES - 1}, {GATHER_US_MAX} us at most"
                )
            bell, bell_fd = _bell_of(bell_fd), -1
            memory, memory_fd = Region.adopt(memory_fd), -1
            ring = SharedRing(memory, terms.entries)
        except BaseException:
            for fd in (memory_fd, bell_fd):
                if fd >= 0:
                    self._close_fd(fd)
            if bell is not None:
                bell.close()
            if memory is not None:
                memory.close()
            raise
        self._last += 1
        attached = AttachedRing(ring, terms, bell, self._performed, self.close)
        self._rings[self._last] = attached
        self._watch(bell, lambda: self._rang(attached))
        if not attached.sleep():
            self._scheduler.rang(attached)
        return self._last

    async def _performed(self, entries: list[Submission], tell: Tell) -> None:
        await self._performer.perform(entries, self._holdings, tell)

    def _remove_ring(self, number: int) -> None:
        ring = self._rings.pop(number, None)
        if ring is None:
            raise EmberfsError(Code.INVALID, f"ring {number} is not known")
        self._drop(ring)

    def _drop(self, ring: AttachedRing) -> None:
        self._scheduler.forget(ring)
        if not ring.closed:
            self._unwatch(ring.bell)
        ring.close()

    def _rang(self, ring: AttachedRing) -> None:
        if ring.heard():
            self._scheduler.rang(ring)
        else:
            self._unwatch(ring.bell)

    # ------------------------------------------------------------ the end

    def _send(self, answer: Answer) -> None:
        try:
            self._connection.send(
                messages.encode_answer(answer), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            )
        except OSError as problem:  # it does not read what it has asked for
            self.close(f"does not take its answers: {problem}")

    def close(self, why: str) -> None:
        """End it; `why` is logged. What is under way ends by itself and is told nobody."""
        if self.closed:
            return
        self.closed = True
        if why:
            log.warning("an application is cut off: %s", why)
        self._unwatch(self._connection)
        for ring in self._rings.values():
            self._drop(ring)
        self._rings.clear()
        self._holdings.close()
        self._connection.close()
        self._gone(self)


_FDS = {Kind.REGION: 1, Kind.FILE: 1, Kind.RING: 2}


def _bell_of(fd: int) -> socket.socket:
    """A socket from the descriptor, which is the caller's until this succeeds."""
    if not stat.S_ISSOCK(identify(fd)[2]):
        raise EmberfsError(Code.INVALID, "the bell is not a socket")
    try:
        bell = socket.socket(fileno=fd)
    except OSError as problem:
        raise EmberfsError(Code.INVALID, f"the bell: {problem}") from None
    if bell.family != socket.AF_UNIX:
        bell.detach()
        raise EmberfsError(Code.INVALID, "the bell is not a Unix socket")
    return bell
