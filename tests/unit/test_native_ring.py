"""The daemon's end of a ring, who is served next, and what is said over the socket."""

import asyncio
import errno
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberfs.client.manyio import Range
from emberfs.client.native import layout, messages, performer
from emberfs.client.native._ring import load, spin, store_then_load
from emberfs.client.native.layout import COMPLETION, SUBMISSION, WRAP, count_of
from emberfs.client.native.messages import Answer, Kind, Request, RingTerms
from emberfs.client.native.scheduler import BATCH_MAX, UNDER_WAY_MAX, Scheduler
from emberfs.client.native.sharedring import SharedRing
from emberfs.proto.errors import Code, EmberfsError


def taken_from(ring: SharedRing, count: int) -> list[int]:
    """Take entries; their user data."""
    return [entry[0] for entry in SUBMISSION.iter_unpack(ring.take(count))]


def tell(ring: SharedRing, completions: list[tuple[int, int]]) -> bool:
    return ring.tell(b"".join(COMPLETION.pack(*one) for one in completions))


class Writer:
    """The application's end, as plain as can be."""

    def __init__(self, ring: SharedRing) -> None:
        self.ring, self.view = ring, ring._view
        self.tail = self.head = 0

    def submit(self, numbers):
        for number in numbers:
            at = layout.HEADER_BYTES + self.tail % self.ring.entries * SUBMISSION.size
            SUBMISSION.pack_into(self.view, at, number, 0, 1, number, 1, 1, 0, 0)
            self.tail = (self.tail + 1) % WRAP
        return bool(store_then_load(self.view, layout.SQ_TAIL, self.tail, layout.SLEEPS))

    def seen(self):
        tail, found = load(self.view, layout.CQ_TAIL), []
        while self.head != tail:
            place = self.head % self.ring.entries * COMPLETION.size
            at = layout.completions_at(self.ring.entries) + place
            found.append(COMPLETION.unpack_from(self.view, at))
            self.head = (self.head + 1) % WRAP
        store_then_load(self.view, layout.CQ_HEAD, self.head, layout.CQ_TAIL)
        return found


def started_at(ring: SharedRing, writer: Writer, index: int) -> None:
    """Let all indices stand at `index`, as after so many entries."""
    ring._taken = ring._told = writer.tail = writer.head = index
    for place in (layout.SQ_TAIL, layout.SQ_HEAD, layout.CQ_TAIL, layout.CQ_HEAD):
        store_then_load(ring._view, place, index, layout.SLEEPS)


@pytest.mark.parametrize("index", [0, 5, WRAP - 3])
def test_entries_come_out_once_and_in_order_over_every_wrap(index):
    ring = SharedRing(8)
    writer, dice = Writer(ring), random.Random(index)
    started_at(ring, writer, index)
    sent = told = 0
    under_way: list[int] = []
    while told < 500:
        room = 8 - (writer.tail - writer.head) % WRAP
        some = dice.randrange(room + 1)
        writer.submit(range(sent, sent + some))
        sent += some
        under_way += taken_from(ring, dice.randrange(9))
        some = dice.randrange(len(under_way) + 1)
        tell(ring, [(number, -number) for number in under_way[:some]])
        del under_way[:some]
        if dice.randrange(2):
            found = writer.seen()
            assert found == [(n, -n) for n in range(told, told + len(found))]
            told += len(found)
    ring.close()


def test_the_bell_is_asked_for_and_nothing_is_missed():
    ring = SharedRing(4)
    writer = Writer(ring)
    assert ring.sleep()
    assert writer.submit([1])  # the daemon sleeps: ring
    assert not ring.sleep()  # something waits already
    ring.wake()
    assert not writer.submit([2])
    assert taken_from(ring, 9) == [1, 2]
    layout.WORD.pack_into(ring._view, layout.WANT, 2)
    store_then_load(ring._view, layout.WAITS, 1, layout.CQ_TAIL)
    assert not tell(ring, [(1, 1)])
    assert tell(ring, [(2, 1)])
    store_then_load(ring._view, layout.WAITS, 0, layout.CQ_TAIL)
    assert spin(ring._view, layout.CQ_TAIL, 2, 1000) == 2
    assert spin(ring._view, layout.CQ_TAIL, 1, 10**12) == 2
    ring.close()


def test_no_more_is_taken_than_can_be_told():
    ring = SharedRing(4)
    writer = Writer(ring)
    writer.submit(range(4))
    assert len(taken_from(ring, 9)) == 4
    tell(ring, [(i, 0) for i in range(4)])
    writer.submit(range(4))  # without having looked at the completions
    assert ring.waiting() == 0
    assert ring.take(9) == b""
    assert len(writer.seen()) == 4
    assert ring.waiting() == 4
    ring.close()


@pytest.mark.parametrize("place", [layout.SQ_TAIL, layout.CQ_HEAD])
def test_indices_of_nonsense(place):
    ring = SharedRing(4)
    store_then_load(ring._view, place, 100, layout.SLEEPS)
    with pytest.raises(EmberfsError, match="no sense"):
        ring.waiting()
    ring.close()


@pytest.mark.parametrize("at", [-4, 2, 1 << 20])
def test_words_outside_the_memory(at):
    with pytest.raises(IndexError):
        load(bytearray(64), at)
    with pytest.raises(IndexError):
        store_then_load(bytearray(64), 0, 1, at)


# ---------------------------------------------------------------- who is served next


class Ring:
    """A ring with so many entries, whose batches end when told."""

    def __init__(self, name, done, terms=RingTerms(8)):  # noqa: B008 (immutable)
        self.terms, self.name, self.done = terms, name, done
        self.left = 0
        self.end = asyncio.Event()

    def waiting(self):
        return self.left

    def take(self, count):
        some = min(count, self.left)
        self.left -= some
        return bytes(some * SUBMISSION.size)

    async def perform(self, entries):
        self.done.append((self.name, count_of(entries)))
        await self.end.wait()

    def sleep(self):
        return not self.left


def scheduled(story):
    async def main():
        scheduler, done = Scheduler(), []
        try:
            await asyncio.wait_for(story(scheduler, done), 10)
        finally:
            await scheduler.close()

    asyncio.run(main())


def test_low_priority_leaves_room():
    async def story(scheduler, done):
        low = Ring("low", done, RingTerms(8, priority=2))
        high = Ring("high", done, RingTerms(8, priority=0))
        low.left = high.left = 3 * UNDER_WAY_MAX
        scheduler.rang(low)
        await asyncio.sleep(0)
        assert scheduler.under_way == UNDER_WAY_MAX // 2
        scheduler.rang(high)
        await asyncio.sleep(0)
        assert scheduler.under_way == UNDER_WAY_MAX
        assert {name for name, _ in done[-UNDER_WAY_MAX // 2 // BATCH_MAX :]} == {"high"}
        low.end.set()
        await asyncio.sleep(0.01)
        assert high.left < 3 * UNDER_WAY_MAX - UNDER_WAY_MAX // 2  # it takes what is free
        high.end.set()
        while low.left or high.left or scheduler.under_way:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert sum(count for name, count in done if name == "low") == 3 * UNDER_WAY_MAX

    scheduled(story)


def test_rings_take_turns():
    async def story(scheduler, done):
        first, second = Ring("first", done), Ring("second", done)
        first.left = second.left = 20 * BATCH_MAX
        first.end.set()
        second.end.set()
        scheduler.rang(first)
        scheduler.rang(second)
        while len(done) < 30:  # noqa: ASYNC110
            await asyncio.sleep(0)
        names = [name for name, _ in done[14:26]]
        assert names.count("first") == names.count("second") == 6
        assert [count for _, count in done[:30]] == [BATCH_MAX] * 30

    scheduled(story)


def test_gathering_waits_for_enough_or_for_long_enough():
    async def story(scheduler, done):
        ring = Ring("r", done, RingTerms(64, depth=8, gather_us=30_000))
        ring.end.set()
        ring.left = 3
        scheduler.rang(ring)
        await asyncio.sleep(0.005)
        assert done == []
        ring.left = 8  # the bell goes on ringing meanwhile
        scheduler.rang(ring)
        await asyncio.sleep(0)
        assert done == [("r", 8)]
        ring.left = 2
        scheduler.rang(ring)
        await asyncio.sleep(0.1)
        assert done == [("r", 8), ("r", 2)]
        ring.left = 1
        scheduler.rang(ring)
        scheduler.forget(ring)
        await asyncio.sleep(0.05)
        assert len(done) == 2

    scheduled(story)


# ---------------------------------------------------------------- writes


def test_writes_are_told_as_they_end(monkeypatch):
    """One that waits does not keep the others' completions back; nor does an error."""

    class File:
        inode_id = 7

    async def story():
        gate, dropped, told = asyncio.Event(), [], []

        async def write_many(ranges, ended):
            ended(1, 4096)
            ended(2, EmberfsError(Code.NO_SPACE, "full"))
            await gate.wait()
            ended(0, 100)
            return []

        async def written(inodes):
            dropped.append(inodes)

        monkeypatch.setattr(performer, "write_many", write_many)
        works = performer.Performer(SimpleNamespace(packed=None), written)
        ranges = [Range(File(), 0, memoryview(bytes(1))) for _ in range(3)]
        writing = asyncio.ensure_future(
            works._write(performer._Wanted([5, 6, 7], ranges), told.append)
        )
        await asyncio.sleep(0.01)
        both = COMPLETION.pack(6, 4096) + COMPLETION.pack(7, -errno.ENOSPC)
        assert (told, dropped) == ([both], [{7}])
        gate.set()
        await writing
        assert told[1:] == [COMPLETION.pack(5, 100)]

    asyncio.run(asyncio.wait_for(story(), 5))


# ---------------------------------------------------------------- messages


@given(st.sampled_from(Kind), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_requests_survive_the_way(kind, first, second):
    request = Request(kind, first, second)
    assert messages.decode_request(messages.encode_request(request)) == request


@given(st.binary(max_size=64))
def test_noise_is_no_request(noise):
    known = len(noise) == 24 and int.from_bytes(noise[:4], "little") in list(Kind)
    if known:
        messages.decode_request(noise)
    else:
        with pytest.raises(EmberfsError) as refused:
            messages.decode_request(noise)
        assert refused.value.code == Code.MALFORMED


@given(st.integers(0, 200), st.integers(0, (1 << 64) - 1), st.text(max_size=2000))
def test_answers_survive_the_way(error, value, words):
    found = messages.decode_answer(messages.encode_answer(Answer(error, value, words)))
    assert found[:2] == (error, value)
    assert words.encode().startswith(found.words.rstrip("\ufffd").encode())


@given(st.integers(1, 1 << 15), st.integers(0, 2), st.integers(0, 1 << 15), st.integers(0, 10**6))
def test_terms_survive_the_way(entries, priority, depth, gather_us):
    terms = RingTerms(entries, priority, depth, gather_us)
    assert messages.unpack_terms(Request(Kind.RING, *messages.pack_terms(terms))) == terms
