"""One conformance suite for every engine: what a service may rely on wherever its rows lie."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from emberfs.kv import slots, tidy
from emberfs.kv.remote import RemoteEngine
from emberfs.kv.transaction import Transaction, pack_counter, unpack_counter
from emberfs.kv.transactions import Engine
from emberfs.proto.errors import Code, EmberfsError
from emberfs.runtime.real import RealEnv
from kv_faulty import FaultyBackend
from unit.kv_engines import KINDS, Place, make_place, put, read_all


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request.param, request, tmp_path)


@pytest.fixture(params=["memory", "rocks", "etcd", "fdb", "fdb stand-in"])
def strict(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Stores where conflicts are exactly what was read, made by hand without faults."""
    return make_place(request.param, request, tmp_path)


async def refused(txn: Transaction) -> Code:
    with pytest.raises(EmberfsError) as raised:
        await txn.commit()
    return raised.value.code


def once_together(count: int) -> Callable[[], Awaitable[None]]:
    """Return a meeting point that only the first try of each of `count` transactions waits at.

    Not for long: an engine may let in one at a time.
    """
    everybody, met = asyncio.Event(), set()

    async def meet() -> None:
        task = asyncio.current_task()
        if task not in met:
            met.add(task)
            if len(met) == count:
                everybody.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(everybody.wait(), 1)

    return meet


def test_counter_by_read_modify_write(place: Place) -> None:
    async def work(engine: Engine) -> None:
        async def increment(txn: Transaction) -> None:
            value = unpack_counter(await txn.get(b"c"))
            await asyncio.sleep(0)
            txn.set(b"c", pack_counter(value + 1))

        async def many() -> None:
            for _ in range(10):
                await engine.run(increment)

        await asyncio.gather(*(many() for _ in range(5)))
        assert unpack_counter((await read_all(engine))[b"c"]) == 50

    place.live(work)


def test_adds_are_exact_and_counters_do_not_conflict(place: Place) -> None:
    async def work(engine: Engine) -> None:
        async def add(txn: Transaction) -> None:
            txn.add(b"Call", 3)
            await asyncio.sleep(0)
            txn.add(b"Call", -1)

        async def plain(txn: Transaction) -> None:
            txn.add(b"plain", 1)

        await asyncio.gather(*(engine.run(add) for _ in range(30)))
        if place.strict and place.kind != "faulty":
            assert engine.conflicts == 0
        await asyncio.gather(*(engine.run(plain) for _ in range(5)))
        counted = {key: unpack_counter(value) for key, value in (await read_all(engine)).items()}
        assert counted == {b"Call": 60, b"plain": 5}

    place.live(work)


def test_a_counter_can_be_set_cleared_and_read_with_what_is_added(place: Place) -> None:
    async def work(engine: Engine) -> None:
        async def value() -> int:
            return unpack_counter(await engine.run(lambda txn: txn.get(b"Cx"), read_only=True))

        async def add(txn: Transaction) -> int:
            txn.add(b"Cx", 2)
            return unpack_counter(await txn.get(b"Cx"))

        async def set_to(txn: Transaction) -> None:
            txn.set(b"Cx", pack_counter(100))

        async def set_and_add(txn: Transaction) -> None:
            txn.set(b"Cx", pack_counter(7))
            txn.add(b"Cx", 1)

        async def clear(txn: Transaction) -> None:
            txn.clear(b"Cx")

        async def clear_range(txn: Transaction) -> None:
            txn.clear_range(b"A", b"D")
            txn.add(b"Cx", 5)

        assert [await engine.run(add) for _ in range(3)] == [2, 4, 6]
        await engine.run(set_to)
        assert await value() == 100
        assert await engine.run(add) == 102
        await engine.run(set_and_add)
        assert await value() == 8
        await engine.run(clear)
        assert await read_all(engine) == {}
        await engine.run(add)
        await engine.run(clear_range)
        assert await value() == 5
        assert await read_all(engine) == {b"Cx": pack_counter(5)}

    place.live(work)


def test_one_winner_creates_a_name(place: Place) -> None:
    async def work(engine: Engine) -> None:
        async def create(txn: Transaction) -> bool:
            taken = await txn.get(b"d/name") is not None
            await asyncio.sleep(0)
            if not taken:
                txn.set(b"d/name", b"1")
            return not taken

        assert sum(await asyncio.gather(*(engine.run(create) for _ in range(8)))) == 1

    place.live(work)


def test_no_write_skew(place: Place) -> None:
    async def work(engine: Engine) -> None:
        for _ in range(5):
            await put(engine, x=b"1", y=b"1")
            meet = once_together(2)

            async def take(txn: Transaction, mine: bytes, meet: Callable = meet) -> None:
                values = await txn.get_many([b"x", b"y"])
                await meet()
                if values == [b"1", b"1"]:
                    txn.set(mine, b"0")

            await asyncio.gather(
                *(engine.run(lambda txn, m=mine: take(txn, m)) for mine in (b"x", b"y"))
            )
            assert sorted((await read_all(engine)).values()) == [b"0", b"1"]

    place.live(work)


def test_no_phantom_in_a_range_that_was_found_empty(place: Place) -> None:
    async def work(engine: Engine) -> None:
        for _ in range(5):
            await put(engine, dir=b"alive")
            meet = once_together(2)

            async def remove(txn: Transaction, meet: Callable = meet) -> None:
                empty = not await txn.get_range(b"dir/", b"dir0", limit=1)
                await meet()
                if empty:
                    txn.clear(b"dir")

            async def create(txn: Transaction, meet: Callable = meet) -> None:
                alive = await txn.get(b"dir")
                await meet()
                if alive:
                    txn.set(b"dir/f", b"1")

            async def empty(txn: Transaction) -> None:
                txn.clear_range(b"dir", b"dir0")

            await asyncio.gather(engine.run(remove), engine.run(create))
            assert set(await read_all(engine)) in ({b"dir", b"dir/f"}, set())
            await engine.run(empty)

    place.live(work)


@pytest.mark.parametrize("by", ["clear", "clear_range", "add", "write_conflict", "stamp", "insert"])
def test_every_kind_of_write_is_seen_by_readers(strict: Place, by: str) -> None:
    async def work(engine: Engine) -> None:
        await put(engine, **({} if by == "insert" else {"s2": pack_counter(1)}))
        point, span, other = engine.begin(), engine.begin(), engine.begin()
        await point.get(b"s2")
        await span.get_range(b"s", b"t")
        await other.get(b"s3")
        await other.get_range(b"a", b"s2")
        writer = engine.begin()
        match by:
            case "clear":
                writer.clear(b"s2")
            case "clear_range":
                writer.clear_range(b"s1", b"s3")
            case "add":
                writer.add(b"s2", 1)
            case "stamp":
                writer.stamp(b"s2")
            case "insert":
                writer.set(b"s2", b"")
            case _:
                writer.add_write_conflict(b"s2", b"s2\0")
        await writer.commit()
        for txn in (point, span, other):
            txn.set(b"out", b"1")
        assert await refused(point) == Code.CONFLICT
        assert await refused(span) == Code.CONFLICT
        if by == "clear_range":
            other.cancel()  # it reads up to s2, which begins inside the cleared range
        else:
            await other.commit()

    strict.live(work)


def test_range_conflict_ends_at_the_last_key_returned(strict: Place) -> None:
    async def work(engine: Engine) -> None:
        await put(engine, k1=b"", k2=b"", k3=b"", k4=b"")
        forward, backward, hit = engine.begin(), engine.begin(), engine.begin()
        assert len(await forward.get_range(b"k", b"l", limit=2)) == 2
        assert len(await backward.get_range(b"k", b"l", limit=1, reverse=True)) == 1
        assert len(await hit.get_range(b"k", b"l", limit=3)) == 3
        await put(engine, k3=b"new")
        for number, txn in enumerate((forward, backward, hit)):
            txn.set(b"out%d" % number, b"1")
        await forward.commit()
        await backward.commit()
        assert await refused(hit) == Code.CONFLICT

    strict.live(work)


def test_snapshot_reads_and_explicit_conflicts(strict: Place) -> None:
    async def work(engine: Engine) -> None:
        await put(engine, a=b"1")
        free, bound = engine.begin(), engine.begin()
        for number, txn in enumerate((free, bound)):
            await txn.get(b"a", snapshot=True)
            await txn.get_range(b"a", b"b", snapshot=True)
            txn.set(b"out%d" % number, b"1")
        bound.add_read_conflict(b"a", b"a\0")
        await put(engine, a=b"2")
        assert await free.get(b"a", snapshot=True) == b"1"  # repeatable
        await free.commit()
        assert await refused(bound) == Code.CONFLICT

    strict.live(work)


def test_what_is_read_is_of_one_moment(place: Place) -> None:
    async def work(engine: Engine) -> None:
        await put(engine, v1=b"1", v2=b"1")
        changed = []

        async def look(txn: Transaction) -> tuple[bytes | None, bytes | None]:
            first = await txn.get(b"v1")
            if not changed:
                changed.append(True)
                await put(engine, v1=b"2", v2=b"2")
            return first, await txn.get(b"v2")

        first, second = await engine.run(look, read_only=True)
        assert first == second

    place.live(work)


def test_own_writes_are_seen(place: Place) -> None:
    names = [b"k0", b"k1", b"k3", b"k5", b"k55", b"k7", b"k8", b"k9"]

    async def work(engine: Engine) -> None:
        await put(engine, n=pack_counter(5), **{f"k{i}": b"old" for i in range(10)})

        async def change(txn: Transaction) -> None:
            txn.clear_range(b"k2", b"k5")
            txn.set(b"k3", b"new")
            txn.clear(b"k6")
            txn.set(b"k55", b"new")
            txn.add(b"n", 2)
            txn.add(b"fresh", 1)
            assert await txn.get(b"k2") is None
            assert await txn.get_many([b"k3", b"k6", b"k7"]) == [b"new", None, b"old"]
            assert unpack_counter(await txn.get(b"n")) == 7
            assert [k for k, _ in await txn.get_range(b"k", b"l")] == names
            for limit in range(1, 9):
                rows = await txn.get_range(b"k", b"l", limit=limit)
                assert [k for k, _ in rows] == names[:limit]
                rows = await txn.get_range(b"k", b"l", limit=limit, reverse=True)
                assert [k for k, _ in rows] == names[::-1][:limit]
            assert await txn.get_range(b"f", b"g") == [(b"fresh", pack_counter(1))]

        await engine.run(change)
        assert list(await read_all(engine, b"k", b"l")) == names
        assert unpack_counter((await read_all(engine))[b"n"]) == 7

    place.live(work)


def test_random_transactions_against_a_dictionary(place: Place) -> None:
    def act(dice: random.Random, txn: Transaction, model: dict[bytes, bytes], step: int) -> None:
        act, low, high = (dice.randrange(4), *(b"%02d" % dice.randrange(30) for _ in range(2)))
        if act == 0:
            txn.set(low, b"%d" % step)
            model[low] = b"%d" % step
        elif act == 1:
            txn.clear(low)
            model.pop(low, None)
        elif act == 2 and dice.random() < 0.3:
            txn.clear_range(low, high)
            for gone in [k for k in model if low <= k < high]:
                del model[gone]

    async def work(engine: Engine) -> None:
        model: dict[bytes, bytes] = {}
        for step in range(20):

            async def change(
                txn: Transaction, step: int = step, before: dict[bytes, bytes] = model
            ) -> dict[bytes, bytes]:
                dice, mine = random.Random(step), dict(before)
                for _ in range(8):
                    act(dice, txn, mine, step)
                    low, high = (b"%02d" % dice.randrange(30) for _ in range(2))
                    limit, reverse = dice.randrange(5), dice.random() < 0.5
                    expected = sorted(
                        ((k, v) for k, v in mine.items() if low <= k < high), reverse=reverse
                    )
                    found = await txn.get_range(low, high, limit=limit, reverse=reverse)
                    assert found == (expected[:limit] if limit else expected)
                    assert await txn.get(high) == mine.get(high)
                return mine

            model = await engine.run(change)
            assert await read_all(engine) == model

    place.live(work)


def test_o5_bank_sum_is_constant_for_every_reader(place: Place) -> None:
    """On every engine: in a storm of conflicting transactions every reader sees one moment."""
    accounts, dice = 8, random.Random(1)

    async def work(engine: Engine) -> None:
        await put(engine, **{f"b{i}": pack_counter(100) for i in range(accounts)})

        async def transfer(txn: Transaction) -> None:
            source, sink = (b"b%d" % i for i in dice.sample(range(accounts), 2))
            amount = unpack_counter(await txn.get(source))
            await asyncio.sleep(0)
            txn.set(source, pack_counter(amount - 1))
            txn.set(sink, pack_counter(unpack_counter(await txn.get(sink)) + 1))

        async def total(txn: Transaction) -> int:
            left = await txn.get_range(b"b0", b"b4")
            await asyncio.sleep(0)
            right = await txn.get_range(b"b4", b"b9")
            return sum(unpack_counter(v) for _, v in left + right)

        async def mover() -> None:
            for _ in range(10):
                await engine.run(transfer)

        async def auditor() -> None:
            for _ in range(15):
                assert await engine.run(total, read_only=True) == accounts * 100

        await asyncio.gather(mover(), mover(), mover(), auditor())

    place.live(work)


def test_stamps_grow_in_the_order_of_commits(place: Place) -> None:
    async def work(engine: Engine) -> None:
        async def stamp(txn: Transaction, name: bytes) -> None:
            txn.set(b"beside" + name, b"")
            txn.stamp(b"s" + name, b"prefix")
            with pytest.raises(EmberfsError, match="stamp"):
                await txn.get(b"s" + name)

        for i in range(4):
            await engine.run(lambda txn, i=i: stamp(txn, b"%d" % i))
        found = list((await read_all(engine, b"s", b"t")).values())
        assert all(value.startswith(b"prefix") and len(value) == 16 for value in found)
        assert found == sorted(set(found))
        assert len(found) == 4

    place.live(work)


def test_a_watch_tells_of_a_change(place: Place) -> None:
    async def work(engine: Engine) -> None:
        assert await engine.watch(b"w", b"other") is None  # it is another one already
        for seen, new in ((None, b"1"), (b"1", b"2")):
            waiting = asyncio.ensure_future(engine.watch(b"w", seen))
            await asyncio.sleep(0.05)
            await put(engine, unrelated=new)
            assert not waiting.done()
            await put(engine, w=new)
            async with asyncio.timeout(5):
                assert await waiting == new
        waiting = asyncio.ensure_future(engine.watch(b"w", b"2"))
        await asyncio.sleep(0.01)

        async def clear(txn: Transaction) -> None:
            txn.clear_range(b"a", b"z")

        await engine.run(clear)
        async with asyncio.timeout(5):
            assert await waiting is None

    place.live(work)


def test_large_transactions_and_long_scans(place: Place) -> None:
    async def work(engine: Engine) -> None:
        for part in range(3):

            async def fill(txn: Transaction, part: int = part) -> None:
                for i in range(800):
                    txn.set(b"big/%05d" % (part * 800 + i), b"v" * 100)

            await engine.run(fill)

        async def look(txn: Transaction) -> tuple[bytes, bytes, int]:
            last = await txn.get_range(b"big/", b"big0", limit=3, reverse=True)
            some = await txn.get_range(b"big/00010", b"big0", limit=2)
            return last[0][0], some[1][0], len(await txn.get_range(b"big/", b"big0"))

        assert await engine.run(look, read_only=True) == (b"big/02399", b"big/00011", 2400)

        async def thin(txn: Transaction) -> None:
            for i in range(5, 1500):
                txn.clear(b"big/%05d" % i)

        await engine.run(thin)

        async def page(txn: Transaction) -> list[bytes]:
            return [key for key, _ in await txn.get_range(b"big/00003", b"big0", limit=4)]

        names = [b"big/00003", b"big/00004", b"big/01500", b"big/01501"]
        assert await engine.run(page, read_only=True) == names

    place.live(work)


def test_too_large_a_transaction_is_refused_whole(place: Place) -> None:
    async def work(engine: Engine) -> None:
        async def large(txn: Transaction) -> None:
            for i in range(17):
                txn.set(b"%d" % i, bytes(1 << 20))

        with pytest.raises(EmberfsError) as raised:
            await engine.run(large)
        assert raised.value.code == Code.TRANSACTION_TOO_LARGE
        assert await read_all(engine) == {}

    place.live(work)


def test_all_bytes_survive(place: Place) -> None:
    keys = [bytes([i]) + b"k" + bytes([255 - i, 0, i]) for i in range(1, 256)]
    plain = [key for key in keys if key[:1] != b"C"]  # counters hold numbers

    async def work(engine: Engine) -> None:
        async def write(txn: Transaction) -> None:
            for key in plain:
                txn.set(key, key[::-1])
            txn.set(b"empty", b"")

        await engine.run(write)
        assert await read_all(engine) == {b"empty": b"", **{key: key[::-1] for key in plain}}
        values = await engine.run(lambda txn: txn.get_many([*plain, b"no", b"empty"]))
        assert values == [*(key[::-1] for key in plain), None, b""]

    place.live(work)


def test_failures_leave_nothing_behind(place: Place) -> None:
    async def work(engine: Engine) -> None:
        async def fails(txn: Transaction) -> None:
            txn.set(b"a", b"1")
            raise EmberfsError(Code.NOT_FOUND, "no")

        async def writes(txn: Transaction) -> None:
            txn.set(b"a", b"1")

        with pytest.raises(EmberfsError, match="no"):
            await engine.run(fails)
        with pytest.raises(EmberfsError) as raised:
            await engine.run(writes, read_only=True)
        assert raised.value.code == Code.READ_ONLY
        assert await read_all(engine) == {}

    place.live(work)


def test_rows_survive_the_process(place: Place) -> None:
    if place.kind in ("memory", "faulty"):
        return

    async def write(engine: Engine) -> None:
        async def change(txn: Transaction) -> None:
            txn.set(b"a", b"1")
            txn.add(b"Cn", 4)
            txn.stamp(b"s", b"")

        await engine.run(change, durable=True)

    async def read(engine: Engine) -> None:
        before = await read_all(engine)
        assert before[b"a"] == b"1"
        assert before[b"Cn"] == pack_counter(4)
        await write(engine)
        after = await read_all(engine)
        assert after[b"Cn"] == pack_counter(8)
        assert after[b"s"] > before[b"s"]

    place.live(write)
    place.live(read)


@pytest.mark.parametrize("kind", ["etcd", "postgres", "fdb", "fdb stand-in"])
def test_processes_share_a_store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    place = make_place(kind, request, tmp_path)

    async def work(first: Engine) -> None:
        second = await place.open()
        try:

            async def count(txn: Transaction) -> None:
                txn.set(b"n", pack_counter(unpack_counter(await txn.get(b"n")) + 1))
                txn.add(b"Cn", 1)

            async def many(engine: Engine) -> None:
                for _ in range(10):
                    await engine.run(count)

            waiting = asyncio.ensure_future(second.watch(b"n", None))
            await asyncio.gather(*(many(engine) for engine in (first, second, first, second)))
            assert await waiting is not None
            expected = {b"n": pack_counter(40), b"Cn": pack_counter(40)}
            assert await read_all(first) == await read_all(second) == expected
        finally:
            await second.close()

    place.live(work)


@pytest.mark.parametrize("kind", ["etcd", "postgres", "fdb", "faulty"])
def test_what_dead_processes_left_is_folded(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(kind, request, tmp_path)

    async def work(engine: Engine) -> None:
        assert isinstance(engine, RemoteEngine)

        async def add(txn: Transaction) -> None:
            txn.add(b"Cx", 1)
            await asyncio.sleep(0.001)

        async def rows() -> int:
            attempt = engine.backend.attempt(read_only=True)
            found = await attempt.scan(*slots.SHARES, 0, False)
            found += await attempt.scan(*slots.SLOTS, 0, False)
            attempt.cancel()
            return len(found)

        if isinstance(engine.backend, FaultyBackend):
            engine.backend.faults = 0
        await asyncio.gather(*(engine.run(add) for _ in range(5)))
        before = await rows()
        assert before >= 2
        assert await tidy.tidy(RealEnv(), engine.backend) == 0  # they are in use
        assert await rows() == before
        monkeypatch.setattr(tidy, "UNUSED_S", -10)
        assert await tidy.tidy(RealEnv(), engine.backend) > 0
        assert await rows() == 0
        assert await read_all(engine) == {b"Cx": pack_counter(5)}
        await engine.run(add)  # a slot that was folded though its process lives
        assert await read_all(engine) == {b"Cx": pack_counter(6)}

    place.live(work)
