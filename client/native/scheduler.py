"""Whose entries are performed next: by priority, in turns, bounded in number.

A ring with `depth` is served when so many entries wait, or when the first has waited as long as it
may; a batch takes what waits then. Rings of low priority leave room for those of a higher one.
"""

import asyncio
from collections import deque
from typing import Protocol

from emberfs.client.native.layout import count_of
from emberfs.client.native.messages import RingTerms
from emberfs.runtime.tasks import TaskSet

PRIORITIES = 3
BATCH_MAX = 256  # entries that are performed together
UNDER_WAY_MAX = 4096  # entries of all rings
SHARES = (1.0, 0.75, 0.5)  # of that, by priority


class Served(Protocol):
    """A ring as the scheduler sees it; nothing of it raises."""

    terms: RingTerms

    def waiting(self) -> int:
        """How many entries can be taken."""
        ...

    def take(self, count: int) -> bytes:
        """Take up to so many; the bell is not needed for now."""
        ...

    async def perform(self, entries: bytes) -> None:
        """Do what they say, and tell."""
        ...

    def sleep(self) -> bool:
        """Ask for the bell; False if entries wait already."""
        ...


class Scheduler:
    """The rings of all applications of one daemon."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks = TaskSet()
        self._ready: tuple[deque[Served], ...] = tuple(deque() for _ in range(PRIORITIES))
        self._queued: set[Served] = set()
        self._gathering: dict[Served, asyncio.TimerHandle] = {}
        self.under_way = 0

    def rang(self, ring: Served) -> None:
        """Entries may wait in a ring, whose bell stays on until they are taken."""
        if ring in self._queued:
            return
        count, terms = ring.waiting(), ring.terms
        if terms.gather_us and count < terms.depth:
            if count and ring not in self._gathering:
                ripe_s = terms.gather_us / 1e6
                self._gathering[ring] = self._loop.call_later(ripe_s, self._queue, ring)
            return
        self._queue(ring)

    def forget(self, ring: Served) -> None:
        """A ring is gone."""
        self._end_gathering(ring)
        if ring in self._queued:
            self._queued.discard(ring)
            self._ready[ring.terms.priority].remove(ring)

    def _end_gathering(self, ring: Served) -> None:
        timer = self._gathering.pop(ring, None)
        if timer is not None:
            timer.cancel()

    def _queue(self, ring: Served) -> None:
        self._end_gathering(ring)
        self._queued.add(ring)
        self._ready[ring.terms.priority].append(ring)
        self._pump()

    def _pump(self) -> None:
        """Begin what there is room for."""
        for queue, share in zip(self._ready, SHARES, strict=True):
            while queue and (room := int(UNDER_WAY_MAX * share) - self.under_way) > 0:
                self._serve(queue.popleft(), room)

    def _serve(self, ring: Served, room: int) -> None:
        self._queued.discard(ring)
        entries = ring.take(min(BATCH_MAX, room))
        if entries:
            self.under_way += count_of(entries)
            self._tasks.spawn(self._perform(ring, entries), name="ring batch")
        if ring.waiting():
            self._queued.add(ring)
            self._ready[ring.terms.priority].append(ring)
        elif not ring.sleep():
            self._loop.call_soon(self.rang, ring)

    async def _perform(self, ring: Served, entries: bytes) -> None:
        try:
            await ring.perform(entries)
        finally:
            self.under_way -= count_of(entries)
            self._pump()

    async def close(self) -> None:
        """Cancel what is under way."""
        for ring in list(self._gathering):
            self._end_gathering(ring)
        await self._tasks.close()
