"""What lies behind the end of a file because its writer died, and who comes after that."""

import pytest

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta import files, schema
from emberfs.meta.clients import SEEN_MAX, Clients
from emberfs.proto import meta_calls as calls
from emberfs.proto.errors import Code
from emberfs.proto.files import Inode
from emberfs.proto.ids import SessionId
from unit.meta_world import CHUNK, CLIENT, World, fails, make_snapshot, play

WRITER = CLIENT + 1
BOTH = {CLIENT: True, WRITER: True}
STRANGER = calls.Caller(77, 77)


async def left_by_a_writer(w: World, length: int = 100, *, seen: bool = True) -> Inode:
    """A file of `length` bytes; another client has put two chunks there and not settled."""
    if seen:
        w.routing = make_snapshot(clients=BOTH)
        w.context.clients.look()
    f = await w.create(b"f", session=0, write=False)
    await w.setattr(f.id, length=length)
    who = calls.RequestId(WRITER, 1)
    request = calls.OpenRequest(calls.Caller(0, 0), who, f.id, SessionId(7), read=True, write=True)
    await files.open_(w.context, request)
    w.chunks.put(f.id, CHUNK, 500)
    return f


def dies(w: World) -> None:
    w.routing = make_snapshot(clients={CLIENT: True})


@pytest.mark.parametrize(
    ("length", "left"),
    [
        (100, {0: 100}),
        (101, {0: 101}),
        (CHUNK + 300, {0: CHUNK, 1: 300}),
        (9 * CHUNK, {0: CHUNK, 1: 500}),
    ],
)
def test_c9_who_sets_a_length_keeps_what_a_dead_writer_was_told_is_written(
    length: int, left: dict[int, int]
) -> None:
    """As if the file had been opened first; behind it there are zeros."""

    async def scene(w: World) -> None:
        f = await left_by_a_writer(w)
        dies(w)
        assert (await w.setattr(f.id, length=length)).length == length
        assert w.chunks.of(f.id) == left

    play(scene)


def test_a_file_grows_over_zeros_when_no_session_knows_of_what_lies_there() -> None:
    """A write that failed, or came late, and whose writer has closed the file."""

    async def scene(w: World) -> None:
        f = await w.create(b"f")
        await w.settle(f.id, length=100, close=True)
        w.chunks.put(f.id, CHUNK, 500)
        await w.setattr(f.id, length=2 * CHUNK)
        assert w.chunks.of(f.id) == {0: 100}

    play(scene)


@pytest.mark.parametrize("seen", [True, False])
def test_what_somebody_may_still_settle_is_left_alone(seen: bool) -> None:
    """By a client that is alive, or of which routing has not told yet."""

    async def scene(w: World) -> None:
        f = await left_by_a_writer(w, seen=seen)
        await w.setattr(f.id, length=2 * CHUNK)
        await w.setattr(f.id, length=2 * CHUNK)
        assert w.chunks.of(f.id) == {0: CHUNK, 1: 500}

    play(scene)


def test_a_late_copy_of_a_truncate_takes_nothing_that_was_written_after_it() -> None:
    async def scene(w: World) -> None:
        f = await w.create(b"f")
        request = calls.SetattrRequest(calls.Caller(0, 0), w.rid(), f.id, length=100)
        await files.setattr_(w.context, request)
        w.chunks.put(f.id, 5000)
        assert (await files.setattr_(w.context, request)).inode.length == 100
        truncating = calls.OpenRequest(
            calls.Caller(0, 0), w.rid(), f.id, SessionId(9), read=True, write=True, truncate=True
        )
        await files.open_(w.context, truncating)
        w.chunks.put(f.id, 6000)
        await files.open_(w.context, truncating)
        assert w.chunks.of(f.id) == {0: 6000}

    play(scene)


def test_who_may_not_truncate_cuts_nothing() -> None:
    async def scene(w: World) -> None:
        f = await left_by_a_writer(w)
        dies(w)
        await fails(Code.ACCESS, w.setattr(f.id, STRANGER, length=CHUNK))
        await fails(Code.ACCESS, w.open_file(f.id, 5, STRANGER, write=True, truncate=True))
        await fails(Code.ACCESS, w.create(b"f", who=STRANGER, truncate=True))
        assert w.chunks.of(f.id) == {0: CHUNK, 1: 500}

    play(scene)


@pytest.mark.parametrize("how", ["open", "create"])
def test_an_empty_file_is_emptied_too(how: str) -> None:
    async def scene(w: World) -> None:
        f = await left_by_a_writer(w, 0)
        dies(w)
        if how == "open":
            await w.open_file(f.id, 5, write=True, truncate=True)
        else:
            await w.create(b"f", session=5, truncate=True)
        assert w.chunks.of(f.id) == {}

    play(scene)


@pytest.mark.parametrize("how", ["open", "create"])
def test_the_next_writer_begins_behind_what_a_dead_one_has_written(how: str) -> None:
    """Else it would leave holes over it, and the end of the dead session would let it grow."""

    async def scene(w: World) -> None:
        f = await left_by_a_writer(w)
        dies(w)
        if how == "open":
            opened = await w.open_file(f.id, 5, write=True)
        else:
            opened = await w.create(b"f", session=5)
        assert opened.length == CHUNK + 500
        assert (await w.getattr(f.id)).length == CHUNK + 500
        assert w.chunks.of(f.id) == {0: CHUNK, 1: 500}

    play(scene)


def test_readers_and_writers_beside_living_ones_measure_nothing() -> None:
    async def scene(w: World) -> None:
        f = await left_by_a_writer(w)
        w.chunks.log.clear()
        assert (await w.open_file(f.id, 5, write=True)).length == 100
        dies(w)
        assert (await w.open_file(f.id, 6)).length == 100
        assert w.chunks.log == []

    play(scene)


def test_a_client_that_is_back_lives_before_routing_shows_it() -> None:
    """It opens its files anew and writes; what it has not told yet must not be cut."""

    async def scene(w: World) -> None:
        f = await left_by_a_writer(w)
        dies(w)
        who = calls.RequestId(WRITER, 2)
        again = calls.OpenRequest(
            calls.Caller(0, 0), who, f.id, SessionId(7), read=True, write=True
        )
        await files.open_(w.context, again)
        w.chunks.put(f.id, CHUNK, 900)
        await w.setattr(f.id, length=2 * CHUNK)
        assert w.chunks.of(f.id) == {0: CHUNK, 1: 900}

    play(scene)


def test_nobody_is_called_dead_while_routing_may_be_old() -> None:
    fresh = True
    now = [make_snapshot(clients={1: True, 2: True})]
    clients = Clients(lambda: now[0], lambda: fresh)
    assert clients.alive() == {1, 2}
    now[0] = make_snapshot(clients={2: True})
    assert clients.is_dead(1)
    fresh = False
    assert not clients.is_dead(1)
    assert clients.alive() is None


def test_a_client_is_dead_when_it_was_seen_alive_and_is_so_no_more() -> None:
    now = [make_snapshot(clients={1: True})]
    clients = Clients(lambda: now[0])
    assert not clients.is_dead(1)
    assert not clients.is_dead(2)
    now[0] = make_snapshot(clients={1: False, 2: True})
    assert clients.is_dead(1)
    now[0] = make_snapshot(clients={1: True})
    assert not clients.is_dead(1)
    assert clients.is_dead(2)
    now[0] = make_snapshot(clients=dict.fromkeys(range(10, 11 + SEEN_MAX), True))
    clients.look()
    assert not clients.is_dead(1)  # forgotten: nothing is said of it


async def torn_file(w: World) -> Inode:
    """A file of 100 bytes; a write that failed has left something behind them."""
    f = await w.create(b"f")
    await w.settle(f.id, length=100, close=True, torn=True)
    w.chunks.put(f.id, CHUNK, 500)
    return f


@pytest.mark.parametrize("how", ["open", "create"])
def test_o2_the_next_writer_makes_holes_over_zeros_where_a_write_has_failed(how: str) -> None:
    """Its failed write is told at close; nothing is listed where nothing is known of that."""

    async def scene(w: World) -> None:
        f = await torn_file(w)
        await w.open_file(f.id, 4)
        assert w.chunks.of(f.id) == {0: CHUNK, 1: 500}  # a reader sees nothing of it
        if how == "open":
            opened = await w.open_file(f.id, 5, write=True)
        else:
            opened = await w.create(b"f", session=5)
        assert (opened.length, opened.torn) == (100, False)
        assert w.chunks.of(f.id) == {0: 100}
        w.chunks.log.clear()
        await w.settle(f.id, session=5, close=True)
        await w.open_file(f.id, 6, write=True)
        assert w.chunks.log == []

    play(scene)


def test_o2_a_late_copy_of_an_open_cuts_nothing_of_a_torn_file() -> None:
    """Its client has written behind the end since."""

    async def scene(w: World) -> None:
        f = await torn_file(w)
        other = SessionId(9)
        await w.settle(f.id, session=1, close=True)
        await w.engine.run(lambda txn: _open_beside(txn, f, other))
        request = calls.OpenRequest(
            calls.Caller(0, 0), w.rid(), f.id, SessionId(5), read=True, write=True
        )
        assert (await files.open_(w.context, request)).inode.torn  # somebody else writes
        await w.settle(f.id, session=9, close=True)
        await files.open_(w.context, request)
        assert w.chunks.of(f.id) == {0: CHUNK, 1: 500}

    play(scene)


async def _open_beside(txn: Transaction, inode: Inode, session: SessionId) -> None:
    record = schema.Session(CLIENT, write=True, privileged=True)
    txn.set(keys.session_key(inode.id, session), schema.SESSION.encode(record))


def test_a_truncate_makes_a_torn_file_whole() -> None:
    async def scene(w: World) -> None:
        f = await torn_file(w)
        assert not (await w.setattr(f.id, length=2 * CHUNK)).torn
        assert w.chunks.of(f.id) == {0: 100}

    play(scene)
