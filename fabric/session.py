"""The server's end of a connection: admission, dispatch to handlers, replies.

Invariants:
- a call is in `_calls` from its admission until its handler has ended, and its memory is given
  back only then (reply payload: when the kernel has taken it);
- the socket is not closed by this side while a handler runs, since a caller that shares memory
  takes the end of the connection for the end of all access to it;
- reading stops (back pressure) while too many calls run, too much output waits, or the buffer pool
  is empty; in the last case for at most `POOL_WAIT_NS`, then the call gets OVERLOADED.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from emberfs.fabric import frame
from emberfs.fabric.buffers import BufferPool
from emberfs.fabric.call import BODY_BYTES_MAX, PAYLOAD_BYTES_MAX, Handler, QuickHandler
from emberfs.fabric.frame import STREAMED, Header, Hello, Kind
from emberfs.fabric.metrics import REFUSED, Tally
from emberfs.fabric.region import Slice
from emberfs.fabric.servercall import Call, filled_views
from emberfs.fabric.shared import RegionTable
from emberfs.fabric.sinks import SinkTable, survey
from emberfs.fabric.stream import LARGE_BYTES, Stream, nowhere
from emberfs.fabric.sweep import Sweep
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, KiB, MiB
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.fabric.session")

CALLS_MAX = 1024  # running, per connection
OUTPUT_BYTES_MAX = 64 * MiB  # waiting for the kernel, per connection
HELD_BYTES_MAX = 128 * MiB  # of the buffer pool, per connection; never more than half of it
POOL_WAIT_NS = SECOND // 2  # below the caller's grace period: a CANCEL may stand behind it
STALL_NS = 10 * SECOND  # a caller that takes no byte of its replies for so long is cut off
HELLO_NS = 5 * SECOND
STOP_NS = 10 * SECOND  # how long a cancelled handler may take to end
QUICK_BYTES_MAX = 256 * KiB  # what a call fills at most that is answered before others are heard
_NO_REGIONS: dict[int, memoryview] = {}
_NO_SINKS = SinkTable(b"", {})


class Host(Protocol):
    """What a session needs of its server."""

    env: Env
    name: str
    handlers: Mapping[int, Handler]
    quick: Mapping[int, QuickHandler]
    pool: BufferPool
    tasks: TaskSet
    draining: bool

    def joined(self, session: "Session") -> None:
        """Hear of a new session."""
        ...

    def left(self, session: "Session") -> None:
        """Hear that a session is over."""
        ...


class Session:
    """One caller."""

    def __init__(self, host: Host, transport: str, peer: str, *, shares_memory: bool) -> None:
        self.peer = peer
        self._host = host
        self._env = host.env
        self._loop = asyncio.get_running_loop()
        self._regions = RegionTable() if shares_memory else None
        self._stream: Stream | None = None
        self._calls: dict[int, Call] = {}
        self._receiving: Call | None = None
        self._greeted = False
        self._waits_for_pool = False
        self._throttled = False
        self._watches_output = False
        self._held_bytes = 0  # buffers of calls and of replies not yet sent
        self._held_bytes_max = min(HELD_BYTES_MAX, host.pool.limit_bytes // 2)
        self._ending: bytes | None = None  # last words, once the handlers have ended
        self._sweeper = Sweep(host.env, self._sweep)
        self._sent_before = 0
        self._moved_ns = 0
        self._born_ns = host.env.now_ns()
        self._tally = Tally("server", transport)

    def attach(self, stream: Stream) -> None:
        """Begin: `stream` was made with this session as its owner."""
        self._stream = stream
        self._host.joined(self)
        self._sweeper.arm(self._born_ns, self._born_ns + HELLO_NS)

    @property
    def idle(self) -> bool:
        """True when no handler runs and all answers are sent."""
        return not self._calls and (self._stream is None or not self._stream.queued_bytes)

    # ------------------------------------------------------------ frames

    def frame_received(self, header: Header, tail: bytes) -> Sequence[memoryview] | None:
        """Take a frame of the caller (see stream.Owner)."""
        kind = header.kind
        if kind is Kind.REQUEST and self._greeted:
            return self._requested(header, tail)
        if kind is Kind.CANCEL and self._greeted:
            call = self._calls.get(header.request)
            if call is not None:
                self._stop(call, EmberfsError(Code.CANCELLED, "cancelled by the caller"))
        elif kind is Kind.REGISTER and self._regions is not None:
            assert self._stream is not None
            self._regions.register(frame.decode_register(tail), self._stream.fds)
        elif kind is Kind.UNREGISTER and self._regions is not None:
            self._regions.unregister(frame.decode_unregister(tail))
        elif kind is Kind.HELLO and not self._greeted:
            self._greet(frame.decode_hello(tail))
        else:
            raise frame.malformed(f"unexpected {kind.name} from a caller")
        return None

    def _greet(self, hello: Hello) -> None:
        assert self._stream is not None
        self._greeted = True
        if hello.name:
            self.peer = f"{hello.name} at {self.peer}"
        ours = Hello(frame.PROTOCOL_VERSION, self._env.host_key, self._host.name)
        self._stream.send(frame.encode_hello(ours))

    def _requested(self, header: Header, tail: bytes) -> Sequence[memoryview] | None:
        assert self._stream is not None
        if header.request == 0 or header.request in self._calls:
            raise frame.malformed("REQUEST with a number that is in use")
        deadline_ns = self._env.now_ns() + header.timeout_ms * MS
        if not (header.sources or header.sinks or header.descriptors_check):
            self._requested_bare(header, tail, deadline_ns)
            return None
        flat, sinks = frame.split_descriptors(header, tail)
        body = memoryview(tail)[header.descriptor_bytes :]
        call = Call(header, body, self.peer, deadline_ns, flat, SinkTable(sinks, {}))
        streamed = _streamed_bytes(flat)
        if streamed != header.payload_bytes:
            raise frame.malformed(
                f"sources of {streamed} bytes with {header.payload_bytes} bytes of payload"
            )
        self._stream.expect_large = streamed >= LARGE_BYTES
        try:
            if header.sinks:
                self._survey_sinks(call)
            self._check(call)
            return self._admit(call)
        except EmberfsError as problem:
            if problem.code is Code.OVERLOADED:
                self._wait_for_pool(call)
                return None
            self._answer_error(call.request, problem)
            return nowhere(streamed)

    def _requested_bare(self, header: Header, tail: bytes, deadline_ns: int) -> None:
        """Admit a call that names no memory, as most calls of metadata are."""
        if header.payload_bytes:
            raise frame.malformed(f"{header.payload_bytes} bytes of payload without a source")
        call = Call(header, memoryview(tail), self.peer, deadline_ns, (), _NO_SINKS)
        try:
            self._check(call)
        except EmberfsError as problem:
            self._answer_error(call.request, problem)
            return
        self._calls[call.request] = call
        self._start(call)

    def _survey_sinks(self, call: Call) -> None:
        """Look at all sinks. INVALID if one is not where it says that it is."""
        descriptors = call.sink_table.descriptors
        regions = self._regions.views if self._regions is not None else _NO_REGIONS
        call.sink_bytes, call.streamed_sink_bytes, bad, used = survey(descriptors, regions)
        if bad >= 0:
            self._region_view(*list(frame.iter_descriptors(descriptors))[bad])
        call.sink_table = SinkTable(descriptors, used)

    def _check(self, call: Call) -> None:
        """Refuse what cannot be done here."""
        if self._host.draining:
            raise EmberfsError(Code.SHUTTING_DOWN, f"{self._host.name} is shutting down")
        if call.method not in self._host.handlers:
            what = f"{self._host.name} has no method {call.method}"
            raise EmberfsError(Code.UNSUPPORTED, what)
        if max(call.source_bytes, call.sink_bytes) > PAYLOAD_BYTES_MAX:
            raise EmberfsError(
                Code.TOO_LARGE, f"sources or sinks of more than {PAYLOAD_BYTES_MAX} bytes"
            )

    def _admit(self, call: Call) -> Sequence[memoryview] | None:
        """Give a call its memory and start it when its payload is there. OVERLOADED: no memory."""
        pool = self._host.pool
        if call.header.sources:
            call.sources_buffer = pool.take(call.source_bytes)
        if call.streamed_sink_bytes:
            try:
                call.sinks_buffer = pool.take(call.streamed_sink_bytes)
            except EmberfsError:
                self._give_back(call)
                raise
        return self._place(call)

    def _place(self, call: Call) -> Sequence[memoryview] | None:
        try:
            destinations = self._place_sources(call)
        except EmberfsError:
            self._give_back(call)
            raise
        if call.sinks_buffer is not None:
            call.sink_table = call.sink_table._replace(streamed=call.sinks_buffer.view)
        self._calls[call.request] = call
        self._held_bytes += call.source_bytes + call.streamed_sink_bytes
        if call.header.payload_bytes:
            self._receiving = call
            self._sweeper.arm(self._env.now_ns(), call.deadline_ns)
            return destinations
        self._start(call)
        return None

    def _place_sources(self, call: Call) -> Sequence[memoryview]:
        """Name the parts of the buffer; pull what lies in regions, return where the rest goes."""
        buffer = call.sources_buffer
        if buffer is None:
            return ()
        region, at, _ = buffer
        sources, destinations = [], []
        flat = call.flat
        for index in range(0, 3 * call.header.sources, 3):
            length = flat[index + 2]
            part = Slice(region, at, length)
            sources.append(part)
            at += length
            if flat[index] == STREAMED:
                destinations.append(part.view)
            else:
                part.view[:] = self._region_view(flat[index], flat[index + 1], length)
        call.sources = sources
        return destinations

    def _region_view(self, region: int, offset: int, length: int) -> memoryview:
        if self._regions is None:
            raise EmberfsError(Code.INVALID, "this transport shares no memory")
        return self._regions.view(region, offset, length)

    def _give_back(self, call: Call) -> None:
        """Return the memory of a call that was never admitted or has ended."""
        for buffer in (call.sources_buffer, call.sinks_buffer):
            if buffer is not None:
                self._host.pool.give(buffer)
        call.sources_buffer = call.sinks_buffer = None

    def _reply_sent(self, buffer: Slice) -> None:
        self._held_bytes -= buffer.length
        self._host.pool.give(buffer)
        if self._throttled:
            self._unthrottle()

    # ------------------------------------------------------------ waiting for memory

    def _wait_for_pool(self, call: Call) -> None:
        assert self._stream is not None
        self._waits_for_pool = True
        self._stream.pause()
        self._host.tasks.spawn(self._take_slowly(call), name="fabric-wait-for-buffers")

    async def _take_slowly(self, call: Call) -> None:
        stream = self._stream
        assert stream is not None
        pool = self._host.pool
        destinations: Sequence[memoryview] | None = None
        wait_ns = min(POOL_WAIT_NS, max(0, call.deadline_ns - self._env.now_ns()))
        try:
            async with asyncio.timeout(wait_ns / 1e9):
                if call.header.sources:
                    call.sources_buffer = await pool.take_wait(call.source_bytes)
                if call.streamed_sink_bytes:
                    call.sinks_buffer = await pool.take_wait(call.streamed_sink_bytes)
            if stream.closed or self._ending is not None:
                self._give_back(call)
                return
            destinations = self._place(call)
        except asyncio.CancelledError:
            self._give_back(call)
            raise
        except (EmberfsError, TimeoutError) as problem:
            self._give_back(call)
            if not isinstance(problem, EmberfsError):
                problem = EmberfsError(
                    Code.OVERLOADED, f"{self._host.name} has no buffers free: try again"
                )
            self._answer_error(call.request, problem)
            destinations = nowhere(call.header.payload_bytes)
        finally:
            self._waits_for_pool = False
        if call.header.payload_bytes:
            stream.provide(destinations or ())
        self._throttled = False
        stream.resume()
        if not self._receiving:
            self._throttle()

    def _throttle(self) -> None:
        """Stop reading while this caller occupies too much."""
        assert self._stream is not None
        if (
            len(self._calls) >= CALLS_MAX
            or self._stream.queued_bytes >= OUTPUT_BYTES_MAX
            or self._held_bytes >= self._held_bytes_max
        ):
            self._throttled = True
            self._stream.pause()
            self._watch_output()

    def _unthrottle(self) -> None:
        stream = self._stream
        assert stream is not None
        if not self._throttled or self._waits_for_pool or stream.closed:
            return
        if stream.queued_bytes >= OUTPUT_BYTES_MAX // 2:
            self._watch_output()
        elif len(self._calls) < CALLS_MAX // 2 and self._held_bytes <= self._held_bytes_max // 2:
            self._throttled = False
            stream.resume()

    def _watch_output(self) -> None:
        """Look again when what waits now is sent; one such look is under way at most."""
        assert self._stream is not None
        if not self._watches_output and self._stream.queued_bytes:
            self._watches_output = True
            self._stream.when_sent(self._output_sent)

    def _output_sent(self) -> None:
        self._watches_output = False
        self._unthrottle()

    # ------------------------------------------------------------ running

    def payload_received(self, header: Header) -> None:
        """Start the call whose payload is complete."""
        call, self._receiving = self._receiving, None
        if call is not None:
            self._start(call)

    def _start(self, call: Call) -> None:
        quick = self._host.quick.get(call.method)
        if quick is not None and call.sink_bytes <= QUICK_BYTES_MAX and self._answers(call, quick):
            return
        now_ns = call.deadline_ns - call.header.timeout_ms * MS
        self._sweeper.arm(now_ns, call.deadline_ns)
        call.task = self._loop.create_task(self._run(call))
        self._throttle()  # not before: its own payload has to come in

    def _answers(self, call: Call, quick: QuickHandler) -> bool:
        """Let a quick handler answer; False if it does not."""
        try:
            body = quick(call)
        except EmberfsError as problem:
            self._ended(call, problem)
        except Exception:
            self._broken(call)
        else:
            if body is None:
                return False
            self._reply(call, body)
        return True

    def _broken(self, call: Call) -> None:
        log.exception("method %d failed for %s", call.method, call.peer)
        what = f"method {call.method} failed: see the log of {self._host.name}"
        self._ended(call, EmberfsError(Code.INTERNAL, what))

    async def _run(self, call: Call) -> None:
        call.started = True
        try:
            if call.ended is not None:
                raise call.ended
            body = await self._host.handlers[call.method](call)
            if len(body) > BODY_BYTES_MAX:
                raise EmberfsError(Code.TOO_LARGE, f"the answer is {len(body)} bytes")
        except EmberfsError as problem:
            self._ended(call, problem)
        except asyncio.CancelledError:
            self._ended(call, call.ended or EmberfsError(Code.CANCELLED, "handler was cancelled"))
        except Exception:
            self._broken(call)
        else:
            self._reply(call, body)

    def _stop(self, call: Call, problem: EmberfsError) -> None:
        """Cancel a handler, once; what it was cancelled for becomes the answer."""
        if call.ended is None:
            call.ended = problem
            # A task that never ran would never come to its end: it looks at `ended` instead.
            if call.task is not None and call.started:
                call.task.cancel()

    def _reply(self, call: Call, body: bytes) -> None:
        stream = self._stream
        assert stream is not None
        if not call.header.sinks:
            stream.send(frame.encode_reply(call.request, body, (), 0))
        else:
            filled = call.filled()
            views = filled_views(call, filled)
            payload_bytes = sum(map(len, views))
            stream.send(frame.encode_reply(call.request, body, filled, payload_bytes))
            if views:
                stream.send_payload(views)
                buffer, call.sinks_buffer = call.sinks_buffer, None
                assert buffer is not None
                self._held_bytes += buffer.length  # `_finished` takes it off for the call
                stream.when_sent(partial(self._reply_sent, buffer))
                self._throttle()
        self._finished(call)

    def _ended(self, call: Call, problem: EmberfsError) -> None:
        self._tally.errors += 1
        if call.ended is not None and problem.code is Code.CANCELLED:
            assert self._stream is not None
            self._stream.send(frame.encode_header(Kind.CANCELLED, call.request))
        else:
            self._answer_error(call.request, problem)
        self._finished(call)

    def _answer_error(self, request: int, problem: EmberfsError) -> None:
        assert self._stream is not None
        self._stream.send(frame.encode_error(request, problem))

    def _finished(self, call: Call) -> None:
        del self._calls[call.request]
        self._held_bytes -= call.source_bytes + call.streamed_sink_bytes
        self._tally.calls += 1
        self._give_back(call)
        if self._throttled:
            self._unthrottle()
        if not self._calls:
            if self._ending is not None:
                self._say_last()
            elif self._stream is not None and not self._stream.unparsed_bytes:
                self._stream.flush()  # the last of a batch: do not wait for the next turn

    # ------------------------------------------------------------ time

    def _sweep(self, now_ns: int) -> None:
        stream = self._stream
        assert stream is not None
        for call in list(self._calls.values()):
            if call is self._receiving:
                if now_ns >= call.deadline_ns + STALL_NS:
                    self._give_up("sends no data")
            elif call.ended is None and now_ns >= call.deadline_ns:
                self._stop(call, EmberfsError(Code.TIMEOUT, f"{self._host.name} took too long"))
        if not self._greeted and now_ns - self._born_ns >= HELLO_NS:
            self.frame_refused(frame.malformed("no HELLO in time"))
        if stream.sent_bytes != self._sent_before or not stream.queued_bytes:
            self._sent_before, self._moved_ns = stream.sent_bytes, now_ns
        elif now_ns - self._moved_ns >= STALL_NS:
            self._give_up("takes no data")
        self._tally.publish(stream.sent_bytes)
        if not stream.closed and (self._calls or stream.queued_bytes or not self._greeted):
            self._sweeper.arm(now_ns, now_ns + SECOND)

    def _give_up(self, why: str) -> None:
        if self._ending is None:
            log.warning("%s %s: closing the connection", self.peer, why)
            self._end(b"")

    # ------------------------------------------------------------ the end

    def frame_refused(self, problem: EmberfsError) -> None:
        """Cut off a caller that sends nonsense; nobody else notices."""
        log.warning("%s: %s; closing the connection", self.peer, problem)
        REFUSED.labels("server").inc()
        self._end(frame.encode_error(0, problem))

    def _end(self, last: bytes) -> None:
        """Cancel the handlers; when they have ended, say `last` and close."""
        if self._ending is not None or self._stream is None:
            return
        self._ending = last
        self._stream.pause()
        self._stop_all(EmberfsError(Code.DISCONNECTED, "the connection is being closed"))
        if not self._calls:
            self._say_last()

    def _say_last(self) -> None:
        assert self._stream is not None
        assert self._ending is not None
        self._stream.linger(self._ending)

    def _stop_all(self, problem: EmberfsError) -> None:
        for call in list(self._calls.values()):
            if call.task is None:  # its payload never came
                del self._calls[call.request]
                self._held_bytes -= call.source_bytes + call.streamed_sink_bytes
                self._give_back(call)
            else:
                self._stop(call, problem)
        self._receiving = None

    async def close(self) -> None:
        """Cancel what runs, wait for it, close."""
        if self._stream is None:
            return
        self._ending = b""
        self._stream.pause()
        self._stop_all(EmberfsError(Code.SHUTTING_DOWN, f"{self._host.name} is shutting down"))
        tasks = [call.task for call in self._calls.values() if call.task is not None]
        if tasks:
            _, running = await asyncio.wait(tasks, timeout=STOP_NS / 1e9)
            if running:
                log.error("%s: %d handlers do not end", self.peer, len(running))
        self._stream.flush()
        self._stream.close(EmberfsError(Code.DISCONNECTED, "closed by this side"))

    def connection_lost(self, problem: EmberfsError) -> None:
        """Cancel everything that runs for this caller (see stream.Owner)."""
        assert self._stream is not None
        if self._ending is None:
            self._ending = b""
        self._sweeper.cancel()
        self._stop_all(problem)
        if self._regions is not None:
            self._regions.clear()
        self._tally.close(self._stream.sent_bytes)
        self._host.left(self)


def _streamed_bytes(flat: tuple[int, ...]) -> int:
    regions, lengths = flat[::3], flat[2::3]
    if not any(regions):
        return sum(lengths)
    return sum(length for region, length in zip(regions, lengths, strict=True) if region == 0)
