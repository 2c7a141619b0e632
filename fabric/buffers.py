"""Reusable buffers in shared memory, by power-of-two size class and bounded in total.

Servers receive payload into them. They are parts of a few memfd regions ("slabs"), so that
forwarding one over shm costs no copy, few descriptors and few registrations.

Invariants: the bytes of all slabs together never exceed the limit; a buffer is either free in
exactly one slab or taken; waiters are served in the order in which they came.
"""

import asyncio
from collections import deque

from emberfs.fabric.region import Region, Slice
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND, KiB, MiB

CLASS_BYTES_MIN = 4 * KiB
CLASS_BYTES_MAX = 64 * MiB
SLAB_BYTES = 4 * MiB  # larger classes have a slab of one buffer
# What a pool keeps for its next user, beside the slab used last; above it, slabs go back to the
# kernel, idle for longest first. Enough for a stream's usual window: a steady load never allocates.
IDLE_BYTES_MAX = 24 * MiB


class _Slab:
    """A region cut into buffers of one class."""

    __slots__ = ("class_bytes", "free", "region", "taken")

    def __init__(self, class_bytes: int, slab_bytes: int) -> None:
        self.class_bytes = class_bytes
        self.region = Region(slab_bytes)
        # The lowest address is taken first: the rest of the slab stays untouched by the kernel.
        self.free = list(range(slab_bytes - class_bytes, -1, -class_bytes))
        self.taken: set[int] = set()


class BufferPool:
    """Buffers for everyone in one process; not thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        assert limit_bytes >= CLASS_BYTES_MIN
        self.limit_bytes = limit_bytes
        self.slab_bytes = 0  # held from the kernel
        self.taken_bytes = 0  # in use, by class size
        self._slabs: dict[int, _Slab] = {}  # by region id
        self._with_room: dict[int, list[_Slab]] = {}  # by class
        self._empty: dict[int, _Slab] = {}  # nothing of them is taken; idle for longest first
        self._waiting: deque[tuple[int, asyncio.Future[Slice]]] = deque()

    def take(self, length: int) -> Slice:
        """Return a buffer of `length` bytes, with whatever content its last user left.

        Raises OVERLOADED when there is no room now (or others already wait for it) and TOO_LARGE
        when there never will be. Never waits; see `take_wait`.
        """
        class_bytes = self._class_of(length)
        found = None if self._waiting else self._take(class_bytes, length)
        if found is None:
            raise EmberfsError(
                Code.OVERLOADED,
                f"buffer pool is full: {self.taken_bytes} of {self.limit_bytes} bytes in use",
            )
        return found

    async def take_within(self, length: int, timeout_ns: int) -> Slice:
        """As `take_wait`, for at most so long; then OVERLOADED."""
        try:
            async with asyncio.timeout(timeout_ns / SECOND):
                return await self.take_wait(length)
        except TimeoutError:
            text = f"no buffer of {length} bytes became free for {timeout_ns // SECOND} s"
            raise EmberfsError(Code.OVERLOADED, text) from None

    async def take_wait(self, length: int) -> Slice:
        """As `take`, but waits for its turn instead of raising OVERLOADED. May be cancelled."""
        class_bytes = self._class_of(length)
        found = None if self._waiting else self._take(class_bytes, length)
        if found is not None:
            return found
        turn: asyncio.Future[Slice] = asyncio.get_running_loop().create_future()
        self._waiting.append((length, turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(turn.result())
            self._serve_waiting()  # whoever stood behind this one may fit
            raise

    def give(self, buffer: Slice) -> None:
        """Return a buffer. Its memory must not be used by the giver any more."""
        slab = self._slabs[buffer.region.id]
        slab.taken.remove(buffer.offset)  # KeyError: given twice, or never taken
        self.taken_bytes -= slab.class_bytes
        if slab.region.abandoned:
            self._retire(slab)
        else:
            if not slab.free:
                self._with_room.setdefault(slab.class_bytes, []).append(slab)
            slab.free.append(buffer.offset)
        if self._waiting:
            self._serve_waiting()
        if not slab.taken and slab.region.id in self._slabs:
            self._empty[slab.region.id] = slab
            self._give_up_idle(slab)

    def _give_up_idle(self, last: _Slab) -> None:
        """Bound what is idle, but leave the slab alone that was used just now.

        It is empty after every call of a lone caller, who would get a new one, and so would the
        server that maps it, for every single call.
        """
        while self.slab_bytes - self.taken_bytes > IDLE_BYTES_MAX:
            oldest = next(iter(self._empty.values()))
            if oldest is last and last.region.size_bytes <= SLAB_BYTES:
                return
            self._retire(oldest)
            if oldest is last:
                return

    def close(self) -> None:
        """Release all memory that nobody uses; nothing can be taken any more."""
        for _, turn in self._waiting:
            if not turn.done():
                turn.set_exception(EmberfsError(Code.SHUTTING_DOWN, "buffer pool is closed"))
        self._waiting.clear()
        self.limit_bytes = 0
        for slab in list(self._slabs.values()):
            slab.region.close()
        self._with_room.clear()
        self._empty.clear()

    def _class_of(self, length: int) -> int:
        class_bytes = max(CLASS_BYTES_MIN, 1 << (length - 1).bit_length()) if length else 0
        class_bytes = class_bytes or CLASS_BYTES_MIN
        if class_bytes > min(CLASS_BYTES_MAX, self.limit_bytes):
            raise EmberfsError(
                Code.TOO_LARGE,
                f"{length} bytes do not fit into a buffer pool of {self.limit_bytes} bytes",
            )
        return class_bytes

    def _take(self, class_bytes: int, length: int) -> Slice | None:
        slabs = self._with_room.get(class_bytes)
        while slabs:
            slab = slabs[-1]
            if slab.region.abandoned:
                slabs.pop()
                continue
            offset = slab.free.pop()
            if not slab.free:
                slabs.pop()
            return self._taken(slab, offset, length)
        grown = self._grow(class_bytes)
        return None if grown is None else self._taken(grown, grown.free.pop(), length)

    def _taken(self, slab: _Slab, offset: int, length: int) -> Slice:
        if not slab.taken:
            self._empty.pop(slab.region.id, None)
        slab.taken.add(offset)
        self.taken_bytes += slab.class_bytes
        return Slice(slab.region, offset, length)

    def _grow(self, class_bytes: int) -> _Slab | None:
        """Add a slab; smaller near the limit, and at the expense of idle ones of other classes."""
        slab_bytes = max(class_bytes, min(SLAB_BYTES, self.limit_bytes // 4))
        slab_bytes -= slab_bytes % class_bytes
        self._reclaim(slab_bytes)
        room = self.limit_bytes - self.slab_bytes
        if room < slab_bytes:
            slab_bytes = room - room % class_bytes
        if slab_bytes <= 0:
            return None
        try:
            slab = _Slab(class_bytes, slab_bytes)
        except OSError as problem:
            raise EmberfsError(Code.OVERLOADED, f"no memory for buffers: {problem}") from None
        self._slabs[slab.region.id] = slab
        self.slab_bytes += slab.region.size_bytes
        if len(slab.free) > 1:
            self._with_room.setdefault(class_bytes, []).append(slab)
        return slab

    def _reclaim(self, wanted: int) -> None:
        """Give idle slabs back to the kernel until `wanted` bytes fit, if that can be."""
        if self.slab_bytes + wanted <= self.limit_bytes:
            return
        for slab in [slab for slab in self._slabs.values() if not slab.taken]:
            self._retire(slab)
            if self.slab_bytes + wanted <= self.limit_bytes:
                return

    def _retire(self, slab: _Slab) -> None:
        """Hand out nothing more of a slab; forget it when its last buffer is back."""
        if slab.region.id not in self._slabs:
            return
        slabs = self._with_room.get(slab.class_bytes, [])
        if slab in slabs:
            slabs.remove(slab)
        slab.free.clear()
        if not slab.taken:
            self._empty.pop(slab.region.id, None)
            del self._slabs[slab.region.id]
            self.slab_bytes -= slab.region.size_bytes
            slab.region.close()

    def _serve_waiting(self) -> None:
        while self._waiting:
            length, turn = self._waiting[0]
            if not turn.done():
                try:
                    found = self._take(self._class_of(length), length)
                except EmberfsError as problem:
                    turn.set_exception(problem)
                else:
                    if found is None:
                        return
                    turn.set_result(found)
            self._waiting.popleft()
