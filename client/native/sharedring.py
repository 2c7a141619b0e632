"""The daemon's end of a ring: takes what was submitted, tells what is complete. See layout.py."""

from emberfs.client.native import layout
from emberfs.client.native._ring import load, store_then_load
from emberfs.client.native.layout import COMPLETION, SUBMISSION, WRAP
from emberfs.fabric.region import Region
from emberfs.proto.errors import Code, EmberfsError


class SharedRing:
    """One ring in memory that an application can scribble on at any time.

    Invariant: taken, not yet told and told but not seen are together at most `entries`, so the
    places of completions suffice. Not thread-safe.
    """

    def __init__(self, entries: int) -> None:
        """Allocate one. INVALID if there is none of so many entries, OSError without memory."""
        if not 0 < entries <= layout.ENTRIES_MAX or entries & (entries - 1):
            raise EmberfsError(
                Code.INVALID, f"{entries} entries: a power of two up to {layout.ENTRIES_MAX}"
            )
        self.entries = entries
        self._memory = Region(layout.ring_bytes(entries))
        self._view = self._memory.view
        layout.START.pack_into(self._view, layout.MAGIC_AT, layout.MAGIC, entries)
        self._first_completion = layout.completions_at(entries)
        self._taken = 0  # our own SQ_HEAD
        self._told = 0  # our own CQ_TAIL
        self.under_way = 0

    @property
    def fd(self) -> int:
        """The memory, to be passed to the application."""
        return self._memory.fd

    def waiting(self) -> int:
        """How many entries can be taken now. MALFORMED when the indices make no sense."""
        return self._waiting(load(self._view, layout.SQ_TAIL))

    def sleep(self) -> bool:
        """Ask for the bell; False if entries wait already."""
        tail = store_then_load(self._view, layout.SLEEPS, 1, layout.SQ_TAIL)
        if not self._waiting(tail):
            return True
        self.wake()
        return False

    def wake(self) -> None:
        """No bell is needed for now."""
        store_then_load(self._view, layout.SLEEPS, 0, layout.SQ_TAIL)

    def take(self, count: int) -> bytes:
        """Take up to `count` entries, as they are; fewer if fewer wait."""
        count = min(count, self.waiting())
        found = b""  # a copy: it is what is checked and used
        for first, some in layout.runs(self._taken, count, self.entries):
            at = layout.HEADER_BYTES + first * SUBMISSION.size
            found += self._view[at : at + some * SUBMISSION.size]
        self._taken = (self._taken + count) % WRAP
        self.under_way += count
        store_then_load(self._view, layout.SQ_HEAD, self._taken, layout.SQ_TAIL)
        return found

    def tell(self, completions: bytes) -> bool:
        """Publish packed completions; True if the application waits for the bell."""
        view, size = self._view, COMPLETION.size
        done = 0
        for first, some in layout.runs(self._told, len(completions) // size, self.entries):
            at = self._first_completion + first * size
            view[at : at + some * size] = completions[done * size : (done + some) * size]
            done += some
        self._told = (self._told + done) % WRAP
        self.under_way -= done
        if not store_then_load(view, layout.CQ_TAIL, self._told, layout.WAITS):
            return False
        want: int = layout.WORD.unpack_from(view, layout.WANT)[0]
        return (self._told - want) % WRAP < WRAP // 2

    def _waiting(self, tail: int) -> int:
        submitted = (tail - self._taken) % WRAP
        unseen = (self._told - load(self._view, layout.CQ_HEAD)) % WRAP
        if submitted > self.entries or unseen > self.entries:
            raise EmberfsError(Code.MALFORMED, "the indices of the ring make no sense")
        return min(submitted, self.entries - unseen - self.under_way)

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()
