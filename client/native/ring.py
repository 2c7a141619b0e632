"""Rings for applications: batches of reads and writes that the client daemon performs.

    with Connection("/mnt/ember") as daemon, open("/mnt/ember/weights", "rb") as weights:
        file, memory = daemon.file(weights), daemon.region(64 << 20)
        with Ring(daemon) as ring:
            ring.read_many([(file, at, memory.slice(at, 4096)) for at in range(0, 1 << 20, 4096)])

Memory of a Region is filled by the storage service itself, on one host by its one `preadv`. That
goes for every array over a Region, too (numpy.frombuffer, torch.frombuffer); other memory is
copied once more. Any number of threads may share a ring; none of its methods survives a fork.
"""

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Self, TypeAlias

from emberfs.client.native import layout
from emberfs.client.native._entries import pack, settle
from emberfs.client.native._ring import load, spin, store_then_load
from emberfs.client.native.connection import Connection, Memory, RegisteredFile
from emberfs.client.native.layout import COMPLETION, READ, SUBMISSION, WRAP, WRITE
from emberfs.client.native.messages import Kind, Request, RingTerms, pack_terms
from emberfs.client.native.staging import Staging
from emberfs.fabric.region import Region, Slice
from emberfs.proto.ids import SECOND

Wanted: TypeAlias = tuple[RegisteredFile, int, Memory]  # file, offset in it, memory
Result: TypeAlias = int | OSError  # bytes, short at the end of the file; or why not

SPIN_NS_MAX = 50_000  # answers that come sooner are waited for without sleeping
_BELL_BYTES = 4096


class Batch:
    """Reads or writes under way together."""

    def __init__(self, number: int, count: int) -> None:
        self.number = number
        self.results: list[Result | None] = [None] * count
        self.left = count  # entries that are not complete
        self.when_done: Callable[[], None] | None = None
        self.staging: Staging | None = None

    def settle(self, place: int, result: int) -> None:
        """Note one result, negative errno for an error."""
        self.results[place] = result if result >= 0 else OSError(-result, os.strerror(-result))
        self.left -= 1


class Ring:
    """A submission and a completion ring shared with the daemon."""

    def __init__(
        self,
        connection: Connection,
        entries: int = 256,
        *,
        priority: int = 1,
        depth: int = 0,
        gather_us: int = 0,
    ) -> None:
        """`entries` (a power of two) may be under way at once; more wait their turn here.

        Rings of priority 0 are served before those of 1 and 2. With `gather_us` the daemon waits
        so long for `depth` entries before it begins. Raises OSError.
        """
        self._connection = connection
        self._entries = entries
        terms = pack_terms(RingTerms(entries, priority, depth, gather_us))
        self._number, (memory, bell) = connection.ask_for(Request(Kind.RING, *terms), 2)
        self._bell = socket.socket(fileno=bell)
        self._memory = Region.adopt(memory)
        self._view = self._memory.view
        self._bell.setblocking(False)
        self._first_completion = layout.completions_at(entries)
        self._submitted = self._seen = 0  # our SQ_TAIL and CQ_HEAD
        self._batches: dict[int, Batch] = {}
        self._last_batch = 0
        self._queue: deque[memoryview] = deque()  # runs of entries for which there was no room yet
        self._state = threading.Condition()
        self._reaping = False  # one thread waits for all
        self._usual_ns = SPIN_NS_MAX  # how long an answer takes
        self._poll = select.poll()
        self._poll.register(self._bell, select.POLLIN)
        self.closed = False
        self.lost = False  # the daemon is gone

    # ------------------------------------------------------------ whole batches

    def read_many(self, wanted: Sequence[Wanted], timeout_s: float | None = None) -> list[Result]:
        """Fill every piece of memory; one result for each, in order. TimeoutError: not yet all."""
        return self.wait(self.submit(READ, wanted), timeout_s)

    def write_many(self, wanted: Sequence[Wanted], timeout_s: float | None = None) -> list[Result]:
        """Write every piece of memory; done means committed by every replica, fsync is yours."""
        return self.wait(self.submit(WRITE, wanted), timeout_s)

    def submit(self, operation: int, wanted: Sequence[Wanted]) -> Batch:
        """Begin reads or writes without waiting. Their memory is the daemon's until they end."""
        slices, staging = self._slices(operation, wanted)
        with self._state:
            self._check()
            self._last_batch = (self._last_batch + 1) % WRAP
            batch = Batch(self._last_batch, len(wanted))
            batch.staging = staging
            if not wanted:
                return batch
            packed, refused = pack(
                list(wanted), slices, self._connection.numbers, operation, batch.number << 32
            )
            for place in refused:
                empty = wanted[place][1] >= 0 and not slices[place].length
                batch.settle(place, 0 if empty else -errno.EINVAL)
            self._batches[batch.number] = batch
            if packed:
                self._queue.append(memoryview(packed))
            self._push()
            self._finish(batch)
        return batch

    def _slices(
        self, operation: int, wanted: Sequence[Wanted]
    ) -> tuple[list[Slice], Staging | None]:
        """Where the memory lies in regions; what lies elsewhere gets a place to be copied by."""
        find = self._connection.find
        found = [find(memory) for _, _, memory in wanted]
        if None not in found:
            return [part for part in found if part is not None], None
        foreign = [i for i, part in enumerate(found) if part is None]
        memories = [wanted[i][2] for i in foreign]
        staging = Staging(self._connection, foreign, memories, operation == WRITE)
        parts = iter(staging.slices)
        return [part if part is not None else next(parts) for part in found], staging

    def wait(self, batch: Batch, timeout_s: float | None = None) -> list[Result]:
        """Wait for a batch to be complete; its results. TimeoutError leaves it under way."""
        end_ns = None if timeout_s is None else _now_ns() + int(timeout_s * SECOND)
        while batch.left:
            with self._state:
                while batch.left and self._reaping:
                    self._state.wait(_left_s(end_ns))
                    _left_s(end_ns)
                if not batch.left:
                    break
                self._check()
                self._reaping = True
                want = 1 if len(self._batches) > 1 or self._queue else batch.left
            try:
                self._await_completions(want, end_ns)
            finally:
                with self._state:
                    self._reaping = False
                    self._state.notify_all()
                    if not self.closed:
                        self._reap()
        if batch.staging is not None:
            batch.staging.finish(batch.results)
            batch.staging = None
        return [result for result in batch.results if result is not None]

    # ------------------------------------------------------------ the protocol

    def _push(self) -> None:
        """Submit what there is room for; ring the bell if the daemon sleeps."""
        room = self._entries - (self._submitted - self._seen) % WRAP
        began = self._submitted
        while self._queue and room:
            some = self._queue.popleft()
            if layout.count_of(some) > room:
                cut = room * SUBMISSION.size
                self._queue.appendleft(some[cut:])
                some = some[:cut]
            self._put(some)
            room -= layout.count_of(some)
        if self._submitted == began:
            return
        if store_then_load(self._view, layout.SQ_TAIL, self._submitted, layout.SLEEPS):
            try:
                self._bell.send(b"\1", socket.MSG_NOSIGNAL)
            except OSError:  # full: the daemon has not slept through that; or gone: waiting says so
                pass

    def _put(self, packed: memoryview) -> None:
        """Place entries, without telling of them."""
        done = 0
        for first, some in layout.runs(self._submitted, layout.count_of(packed), self._entries):
            at, size = layout.HEADER_BYTES + first * SUBMISSION.size, some * SUBMISSION.size
            self._view[at : at + size] = packed[done : done + size]
            done += size
        self._submitted = (self._submitted + layout.count_of(packed)) % WRAP

    def _reap(self) -> None:
        """Note what is complete, and submit what waited for room."""
        tail = load(self._view, layout.CQ_TAIL)
        count = (tail - self._seen) % WRAP
        if not count:
            return
        ended: set[Batch] = set()
        for first, some in layout.runs(self._seen, count, self._entries):
            at = self._first_completion + first * COMPLETION.size
            counts, failed = settle(self._view[at : at + some * COMPLETION.size], self._batches)
            for number, place, result in failed:
                self._batches[number].settle(place, result)
            for number, noted in counts:
                batch = self._batches[number]
                batch.left -= noted
                if not batch.left:
                    ended.add(batch)
        self._seen = tail
        store_then_load(self._view, layout.CQ_HEAD, tail, layout.CQ_TAIL)
        if self._queue:
            self._push()
        for batch in ended:
            self._finish(batch)

    def _finish(self, batch: Batch) -> None:
        if not batch.left:
            self._batches.pop(batch.number, None)
            if batch.when_done is not None:
                batch.when_done()

    def arm(self, want: int) -> bool:
        """Ask for the bell when `want` more are complete; False if they are already."""
        layout.WORD.pack_into(self._view, layout.WANT, (self._seen + want) % WRAP)
        tail = store_then_load(self._view, layout.WAITS, 1, layout.CQ_TAIL)
        return (tail - self._seen) % WRAP < want

    def _await_completions(self, want: int, end_ns: int | None) -> None:
        """Return when some are there; spins first if they usually come that soon."""
        began_ns = _now_ns()
        usual_ns = self._usual_ns
        if usual_ns < SPIN_NS_MAX:
            found = spin(self._view, layout.CQ_TAIL, self._seen, 2 * usual_ns)
            if found != self._seen:
                self._note_wait(began_ns)
                return
        if self.arm(want):
            self._sleep(end_ns)
        store_then_load(self._view, layout.WAITS, 0, layout.CQ_TAIL)
        self._note_wait(began_ns)

    def _sleep(self, end_ns: int | None) -> None:
        left_s = _left_s(end_ns)
        events = self._poll.poll(None if left_s is None else left_s * 1000)
        if events and not self._bell_rings():
            self._lose()

    def _note_wait(self, began_ns: int) -> None:
        self._usual_ns = (3 * self._usual_ns + _now_ns() - began_ns) // 4

    def _lose(self) -> None:
        """The daemon is gone: nothing that is under way is ever told."""
        with self._state:
            self.lost = True
            self._reap()
            for batch in list(self._batches.values()):
                for place, result in enumerate(batch.results):
                    if result is None:
                        batch.settle(place, -errno.ENOTCONN)
                self._finish(batch)
            self._queue.clear()

    def _check(self) -> None:
        if self.closed:
            raise ValueError("the ring is closed")
        if self.lost:
            raise OSError(errno.ENOTCONN, "the client daemon is gone; open files and rings anew")

    # ------------------------------------------------------------ for event loops

    def fileno(self) -> int:
        """Readable when the bell has rung; then call `collect`."""
        return self._bell.fileno()

    def collect(self) -> None:
        """Note what is complete; call it when the bell has rung (see aioring.py)."""
        if self.closed:
            return
        if not self._bell_rings():
            self._lose()
        with self._state:
            self._reap()

    def _bell_rings(self) -> bool:
        """Take the rings of the bell off the socket; False when the daemon's end is gone."""
        try:
            return bool(self._bell.recv(_BELL_BYTES))
        except BlockingIOError:
            return True
        except OSError:
            return False

    # ------------------------------------------------------------ the end

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End it. What is under way may still come into its memory, and is told nobody."""
        with self._state:
            if self.closed:
                return
            self.closed = True
            self._state.notify_all()
        self._connection.forget(Kind.FORGET_RING, self._number)
        self._bell.close()
        self._memory.close()


def _now_ns() -> int:
    return time.perf_counter_ns()


def _left_s(end_ns: int | None) -> float | None:
    if end_ns is None:
        return None
    left_ns = end_ns - _now_ns()
    if left_ns <= 0:
        raise TimeoutError(errno.ETIMEDOUT, "the batch is not complete in time")
    return left_ns / SECOND
