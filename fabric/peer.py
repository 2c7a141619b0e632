"""The caller's end of a connection: correlation, deadlines, cancellation, bounded in flight.

Invariants: a call is in `_pending` from the moment its request is queued until nothing touches its
memory any more; only then does its caller hear of it. What arrives for a call that is not there is
received into nowhere. One timer per connection looks after all deadlines.

Memory that is shared with the server (shm) is only certain to be at rest when the server says so
(REPLY, ERROR, CANCELLED) or is gone: the kernel tears a dying process's memory down before it
closes its sockets, and a living server closes a connection only after the handlers have ended. If
the server does not answer a CANCEL within `GRACE_NS`, the connection is closed and the regions are
marked `abandoned`: they must not be used again.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from emberfs.fabric import frame
from emberfs.fabric.call import Reply, Started
from emberfs.fabric.frame import Header, Hello, Kind, Registration
from emberfs.fabric.gather import Gathered, filled_views, gather, gather_sinks
from emberfs.fabric.metrics import Tally
from emberfs.fabric.region import SHARED_BYTES_MAX, Buffer, Region
from emberfs.fabric.shared import inode_of
from emberfs.fabric.sinks import PackedSinks
from emberfs.fabric.stream import LARGE_BYTES, Stream, nowhere
from emberfs.fabric.sweep import Sweep
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, MiB
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.fabric.peer")

INFLIGHT_CALLS_MAX = 512
# What calls in flight occupy at the server; one call may exceed it alone. Below what makes a server
# stop reading, where a CANCEL would not be heard.
INFLIGHT_BYTES_MAX = 96 * MiB
QUEUED_BYTES_MAX = 256 * MiB  # unsent, given-up payload included
GRACE_NS = 1 * SECOND
STALL_NS = 1 * SECOND  # a connection that takes no byte for a call's whole timeout is dead
REGIONS_MAX = 1000  # per connection; Slices of further regions are streamed


@dataclass(slots=True, eq=False)
class _Pending:
    """One call under way."""

    future: asyncio.Future[Reply]
    sinks: Gathered
    cost: int
    begun_ns: int
    deadline_ns: int
    sent_before: int  # bytes the stream had sent when the call began
    regions: list[Region]
    place: tuple[int, int] = (0, 0)  # of the payload in the stream
    reply: Reply | None = None  # complete but for its payload
    problem: EmberfsError | None = None  # given up for this reason, the server has been told
    grace_ns: int = 0


@dataclass(slots=True, eq=False)
class _Waiter:
    """A call that is not yet allowed to begin."""

    future: asyncio.Future[None]
    cost: int
    deadline_ns: int


@dataclass(slots=True)
class _Shared:
    """Regions that the server knows."""

    registered: dict[int, Region] = field(default_factory=dict)
    bytes: int = 0  # of all of them


class StreamPeer:
    """A connection to one server over a stream socket (see call.Peer)."""

    def __init__(self, env: Env, endpoint: str, transport: str, *, shares_memory: bool) -> None:
        self.endpoint = endpoint
        self.transport = transport
        self._env = env
        self._loop = asyncio.get_running_loop()
        self._shared = _Shared() if shares_memory else None
        self._stream: Stream | None = None
        self.hello: asyncio.Future[Hello] = self._loop.create_future()
        self._last_request = 0
        self._pending: dict[int, _Pending] = {}
        self._waiting: deque[_Waiter] = deque()
        self._inflight = 0
        self._inflight_bytes = 0
        self._large = 0  # calls that expect large streamed payload
        self._sweeper = Sweep(env, self._sweep)
        self._problem: EmberfsError | None = None
        self._tally = Tally("client", transport)

    def attach(self, stream: Stream) -> None:
        """Begin: `stream` was made with this peer as its owner."""
        self._stream = stream
        stream.send(frame.encode_hello(Hello(frame.PROTOCOL_VERSION, self._env.host_key)))

    @property
    def closed(self) -> bool:
        """True once the connection is gone."""
        return self._problem is not None

    async def close(self) -> None:
        """End the connection; pending calls fail with DISCONNECTED."""
        self._shut("closed by this side")

    # ------------------------------------------------------------ calls

    async def call(
        self,
        method: int,
        body: bytes,
        *,
        sources: Sequence[Buffer] = (),
        sinks: Sequence[Buffer] | PackedSinks = (),
        timeout_ns: int,
    ) -> Reply:
        """Perform one call (see call.Peer)."""
        now_ns = self._env.now_ns()
        deadline_ns = now_ns + timeout_ns
        pulled, filled = self._described(body, sources, sinks)
        cost = pulled.length + filled.streamed
        if self._waiting or not self._fits(cost):
            await self._admission(cost, deadline_ns, now_ns)
        else:
            self._inflight += 1
            self._inflight_bytes += cost
        request, pending = self._begin(method, body, pulled, filled, cost, deadline_ns)
        try:
            return await pending.future
        except asyncio.CancelledError:
            if self._pending.get(request) is pending:
                await self._cancel(request, pending)
            raise

    def start(
        self,
        method: int,
        body: bytes,
        *,
        sinks: Sequence[Buffer] | PackedSinks = (),
        timeout_ns: int,
    ) -> Started | None:
        """Begin a call at once (see call.Peer)."""
        deadline_ns = self._env.now_ns() + timeout_ns
        pulled, filled = self._described(body, (), sinks)
        cost = filled.streamed
        if self._waiting or not self._fits(cost):
            return None
        self._inflight += 1
        self._inflight_bytes += cost
        request, pending = self._begin(method, body, pulled, filled, cost, deadline_ns)
        return Started(pending.future, partial(self._give_up, request, pending))

    def _described(
        self, body: bytes, sources: Sequence[Buffer], sinks: Sequence[Buffer] | PackedSinks
    ) -> tuple[Gathered, Gathered]:
        """Sources and sinks as the server will see them. Raises what `call` raises at once."""
        if self._problem is not None:
            raise self._gone()
        shared = self._shared is not None
        pulled = gather(sources, self._share_source if shared else None)
        filled = gather_sinks(sinks, self._share if shared else None)
        frame.check_request(len(body), pulled.number, pulled.length, filled.number, filled.length)
        return pulled, filled

    def _begin(
        self,
        method: int,
        body: bytes,
        pulled: Gathered,
        filled: Gathered,
        cost: int,
        deadline_ns: int,
    ) -> tuple[int, _Pending]:
        stream = self._stream
        assert stream is not None
        self._last_request = request = self._last_request + 1
        now_ns = self._env.now_ns()
        future: asyncio.Future[Reply] = self._loop.create_future()
        regions = pulled.regions + filled.regions
        pending = _Pending(future, filled, cost, now_ns, deadline_ns, stream.sent_bytes, regions)
        self._pending[request] = pending
        if filled.streamed >= LARGE_BYTES:
            self._large += 1
            stream.expect_large = True
        head = frame.encode_request(
            request,
            method,
            body,
            sources=pulled.number,
            sinks=filled.number,
            descriptors=pulled.descriptors + filled.descriptors,
            payload_bytes=pulled.streamed,
            timeout_ms=-(-(deadline_ns - now_ns) // MS),
        )
        stream.send(head)
        if pulled.streamed:
            pending.place = stream.send_payload(pulled.views)
        if len(self._pending) == 1:
            stream.flush()  # nobody to share the system call with: do not wait for the next turn
            pending.sent_before = stream.sent_bytes
        if self._problem is None:
            self._sweeper.arm(now_ns, deadline_ns)
        return request, pending

    def _share_source(self, region: Region) -> bool:
        """As `_share`; but an abandoned region can be sent: retries carry the same memory.

        Nobody else writes to what is only a source, so its bytes are as they were; they are
        streamed, because the region is not to be named to any server again.
        """
        return not region.abandoned and self._share(region)

    def _share(self, region: Region) -> bool:
        """Make sure that the server has a region mapped; False if it has to be streamed."""
        shared, stream = self._shared, self._stream
        assert shared is not None
        assert stream is not None
        if region.abandoned:
            raise EmberfsError(
                Code.INVALID, "a server may still write to this region: use another one"
            )
        if region.id in shared.registered:
            return True
        if region.fd < 0:
            raise EmberfsError(Code.INVALID, "the region is closed")
        if len(shared.registered) >= REGIONS_MAX:
            return False
        if shared.bytes + region.size_bytes > SHARED_BYTES_MAX:
            return False
        shared.registered[region.id] = region
        shared.bytes += region.size_bytes
        region.watchers.add(self._region_closed)
        registration = Registration(region.id, region.size_bytes, inode_of(region.fd))
        stream.send_fd(frame.encode_register(registration), region.fd)
        return True

    def _region_closed(self, region: int) -> None:
        if self._shared is not None and self._stream is not None:
            known = self._shared.registered.pop(region, None)
            self._shared.bytes -= known.size_bytes if known is not None else 0
            self._stream.send(frame.encode_unregister(region))

    # ------------------------------------------------------------ admission

    def _fits(self, cost: int) -> bool:
        return self._inflight < INFLIGHT_CALLS_MAX and (
            self._inflight_bytes + cost <= INFLIGHT_BYTES_MAX or not self._inflight
        )

    async def _admission(self, cost: int, deadline_ns: int, now_ns: int) -> None:
        """Wait in line until this call may begin; it is then counted."""
        waiter = _Waiter(self._loop.create_future(), cost, deadline_ns)
        self._waiting.append(waiter)
        self._sweeper.arm(now_ns, deadline_ns)
        try:
            await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled():
                if waiter.future.exception() is None:
                    self._release(cost)
            else:
                self._admit()  # whoever stood behind this one may fit
            raise
        if self._problem is not None:
            raise self._gone()

    def _admit(self) -> None:
        while self._waiting:
            waiter = self._waiting[0]
            if not waiter.future.done():
                if not self._fits(waiter.cost):
                    return
                self._inflight += 1
                self._inflight_bytes += waiter.cost
                waiter.future.set_result(None)
            self._waiting.popleft()

    def _release(self, cost: int) -> None:
        self._inflight -= 1
        self._inflight_bytes -= cost
        if self._waiting:
            self._admit()

    # ------------------------------------------------------------ answers

    def frame_received(self, header: Header, tail: bytes) -> Sequence[memoryview] | None:
        """Take a frame of the server (see stream.Owner)."""
        kind = header.kind
        if kind is Kind.REPLY:
            return self._replied(header, tail)
        if kind is Kind.ERROR:
            self._failed(header.request, frame.decode_error(tail))
        elif kind is Kind.CANCELLED:
            self._failed(header.request, EmberfsError(Code.CANCELLED, "cancelled by the server"))
        elif kind is Kind.HELLO and not self.hello.done():
            self.hello.set_result(frame.decode_hello(tail))
        else:
            raise frame.malformed(f"unexpected {kind.name} from a server")
        return None

    def _replied(self, header: Header, tail: bytes) -> Sequence[memoryview]:
        pending = self._pending.get(header.request)
        if pending is None:
            return nowhere(header.payload_bytes)
        sinks = pending.sinks
        filled = sinks.filled(header, tail)
        pending.reply = Reply(tail[header.descriptor_bytes :], filled)
        views = filled_views(sinks, filled, header.payload_bytes)
        if pending.problem is not None:
            views = nowhere(header.payload_bytes)
        if not header.payload_bytes:
            self._finish(header.request, pending)
        return views

    def payload_received(self, header: Header) -> None:
        """Complete the call whose payload has arrived."""
        pending = self._pending.get(header.request)
        if pending is not None and pending.reply is not None:
            self._finish(header.request, pending)

    def _failed(self, request: int, problem: EmberfsError) -> None:
        if request == 0:
            self._hello_failed(problem)
            self._shut(f"refused by the server: {problem}")
            return
        pending = self._pending.get(request)
        if pending is not None:
            pending.problem = pending.problem or problem
            self._finish(request, pending)

    def _finish(self, request: int, pending: _Pending) -> None:
        """Nothing touches the call's memory any more: tell the caller."""
        del self._pending[request]
        stream = self._stream
        assert stream is not None
        if pending.place[1] > stream.sent_bytes:
            stream.withdraw(pending.place)  # given up, or answered early
        if pending.sinks.streamed >= LARGE_BYTES:
            self._large -= 1
            stream.expect_large = self._large > 0
        self._tally.calls += 1
        self._release(pending.cost)
        if pending.problem is not None:
            self._tally.errors += 1
        if pending.future.done():
            return
        if pending.problem is not None:
            pending.future.set_exception(pending.problem)
        else:
            assert pending.reply is not None
            pending.future.set_result(pending.reply)

    # ------------------------------------------------------------ giving up

    def _expire(self, request: int, pending: _Pending, problem: EmberfsError, now_ns: int) -> None:
        """Give a call up: at once, or when the server confirms if it shares memory with us."""
        stream = self._stream
        assert stream is not None
        pending.problem = problem
        if self._stalled(pending, now_ns):
            self._shut("the server takes no more data")
            return
        stream.send(frame.encode_header(Kind.CANCEL, request))
        receiving = stream.receiving
        if receiving is not None and receiving.request == request:
            stream.divert()
        if pending.regions:
            pending.grace_ns = now_ns + GRACE_NS
            self._sweeper.arm(now_ns, pending.grace_ns)
        else:
            self._finish(request, pending)

    def _stalled(self, pending: _Pending, now_ns: int) -> bool:
        stream = self._stream
        assert stream is not None
        if stream.queued_bytes > QUEUED_BYTES_MAX:
            return True
        moved = stream.sent_bytes > pending.sent_before
        return bool(stream.queued_bytes) and not moved and now_ns - pending.begun_ns >= STALL_NS

    def _give_up(self, request: int, pending: _Pending, problem: EmberfsError) -> None:
        if pending.problem is None and self._pending.get(request) is pending:
            self._expire(request, pending, problem, self._env.now_ns())

    async def _cancel(self, request: int, pending: _Pending) -> None:
        """The caller's task is cancelled: tell the server and wait until memory is at rest."""
        problem = EmberfsError(Code.CANCELLED, "cancelled by the caller")
        if pending.problem is None:
            self._expire(request, pending, problem, self._env.now_ns())
        while self._pending.get(request) is pending:
            pending.future = self._loop.create_future()
            try:
                await pending.future
            except (asyncio.CancelledError, EmberfsError):
                pass  # a further cancellation cannot hurry the server; the grace period can

    def _sweep(self, now_ns: int) -> None:
        for request, pending in list(self._pending.items()):
            if pending.problem is None:
                if now_ns >= pending.deadline_ns:
                    waited_ms = (now_ns - pending.begun_ns) // MS
                    problem = self._error(Code.TIMEOUT, f"no answer within {waited_ms} ms")
                    self._expire(request, pending, problem, now_ns)
            elif pending.grace_ns and now_ns >= pending.grace_ns:
                self._shut("the server does not confirm a cancellation")
            if self._problem is not None:
                return
        for waiter in [w for w in self._waiting if now_ns >= w.deadline_ns]:
            self._waiting.remove(waiter)
            if not waiter.future.done():
                why = "too many calls in flight for too long"
                waiter.future.set_exception(self._error(Code.TIMEOUT, why))
        self._admit()
        if self._stream is not None:
            self._tally.publish(self._stream.sent_bytes)
        if self._pending or self._waiting:
            deadlines = [p.grace_ns or p.deadline_ns for p in self._pending.values()]
            deadlines += [w.deadline_ns for w in self._waiting]
            self._sweeper.arm(now_ns, min(deadlines))

    # ------------------------------------------------------------ the end

    def frame_refused(self, problem: EmberfsError) -> None:
        """Drop a connection that does not speak our language."""
        log.error("%s: %s; closing the connection", self.endpoint, problem)
        self._hello_failed(problem)
        self._shut(str(problem))

    def _hello_failed(self, problem: EmberfsError) -> None:
        if not self.hello.done():
            self.hello.set_exception(problem)
            self.hello.exception()  # known, even if nobody waits any more

    def _shut(self, why: str) -> None:
        """Close from this side: what the server has mapped may still change."""
        for pending in self._pending.values():
            for region in pending.regions:
                region.abandoned = True
        if self._stream is not None and self._problem is None:
            self._stream.flush()  # a last CANCEL or UNREGISTER
            self._stream.close(EmberfsError(Code.DISCONNECTED, why))

    def connection_lost(self, problem: EmberfsError) -> None:
        """Fail all calls (see stream.Owner)."""
        self._problem = problem
        self._sweeper.cancel()
        self._hello_failed(self._gone())
        if self._shared is not None:
            for region in self._shared.registered.values():
                region.watchers.discard(self._region_closed)
            self._shared.registered.clear()
        for request, pending in list(self._pending.items()):
            pending.problem = pending.problem or self._gone()
            self._finish(request, pending)
        for waiter in self._waiting:
            if not waiter.future.done():
                waiter.future.set_exception(self._gone())
        self._waiting.clear()
        if self._stream is not None:
            self._tally.close(self._stream.sent_bytes)

    def _gone(self) -> EmberfsError:
        assert self._problem is not None
        return self._error(Code.DISCONNECTED, self._problem.message)

    def _error(self, code: Code, what: str) -> EmberfsError:
        return EmberfsError(code, f"{self.endpoint}: {what}")
