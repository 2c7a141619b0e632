"""Regular files: open, settle, truncate, attributes, deferred deletion."""

import asyncio
import stat

import pytest

from emberfs.kv import keys
from emberfs.meta import files
from emberfs.meta.clients import Clients
from emberfs.meta.sessions import SessionSweeper
from emberfs.meta.space import statfs
from emberfs.proto import meta_calls as calls
from emberfs.proto.cluster import PublicState
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import FILE_BYTES_MAX
from emberfs.proto.ids import ROOT_INODE, SECOND
from emberfs.runtime.real import RealEnv
from unit.meta_world import (
    ALICE,
    BOB,
    CHUNK,
    CLIENT,
    ROOT,
    World,
    chain,
    fails,
    make_snapshot,
    play,
    snapshot,
    until,
)

DISK = EmberfsError(Code.TIMEOUT, "chain 1 does not answer")


# ---------------------------------------------------------------- create and open


def test_layout_of_new_files() -> None:
    async def scene(w: World) -> None:
        serving, lost = PublicState.SERVING, PublicState.OFFLINE
        w.routing = snapshot(*(chain(n, serving) for n in (5, 3, 9)), chain(4, lost))
        found = set()
        for i in range(6):
            layout = (await w.create(b"f%d" % i)).layout
            assert layout is not None
            assert layout.chunk_bytes == CHUNK
            found.add(layout.chains)
        assert found == {(3, 5, 9), (5, 9, 3), (9, 3, 5)}
        w.routing = make_snapshot(chains=40)
        layout = (await w.create(b"wide")).layout
        assert layout is not None
        assert len(set(layout.chains)) == 16
        w.routing = snapshot(chain(4, lost))
        await fails(Code.NOT_SERVING, w.create(b"g"))
        await w.mkdir(b"directories need no chain")

    play(scene)


def test_ids_are_never_used_twice_even_after_a_power_cut() -> None:
    async def scene(w: World) -> None:
        seen = {(await w.file(b"f%d" % i)).id for i in range(5)}
        w.store.crash()  # type: ignore[attr-defined]
        w.boot()
        await w.open()
        assert await w.names() == []
        seen |= {(await w.file(b"f%d" % i)).id for i in range(1500)}
        assert len(seen) == 1505

    play(scene)


def test_create_or_open() -> None:
    async def scene(w: World) -> None:
        first = await w.create(b"f", session=1)
        assert first.mode == stat.S_IFREG | 0o644
        again = await w.create(b"f", session=2, mode=0o600)
        assert (again.id, again.mode) == (first.id, first.mode)
        await fails(Code.EXISTS, w.create(b"f", exclusive=True))
        await w.mkdir(b"d")
        await fails(Code.IS_DIRECTORY, w.create(b"d"))
        await w.mknod(b"p", stat.S_IFIFO)
        await fails(Code.UNSUPPORTED, w.create(b"p"))
        await fails(Code.ACCESS, w.create(b"f", who=ALICE, write=True))
        assert (await w.create(b"f", who=ALICE, write=False)).id == first.id
        await fails(Code.ACCESS, w.create(b"new", who=ALICE))
        assert len(w.rows(keys.Prefix.SESSION)) == 2  # 1 was used again, 2
        await w.create(b"g", session=0)
        assert len(w.rows(keys.Prefix.SESSION)) == 2

    play(scene)


def test_who_has_made_a_file_is_told_so() -> None:
    async def scene(w: World) -> None:
        async def create(session: int) -> bool:
            request = calls.CreateRequest(
                ROOT, w.rid(), ROOT_INODE, b"f", mode=0o644, session=session, write=True
            )
            return (await files.create(w.context, request)).is_new

        assert [await create(1), await create(2)] == [True, False]

    play(scene)


def test_open_checks_permission() -> None:
    async def scene(w: World) -> None:
        f = await w.file(b"f", mode=0o640)
        await fails(Code.ACCESS, w.open_file(f.id, 3, ALICE))
        await w.setattr(f.id, gid=50)
        await w.open_file(f.id, 3, ALICE)
        await fails(Code.ACCESS, w.open_file(f.id, 4, ALICE, write=True))
        await fails(Code.ACCESS, w.open_file(f.id, 4, ALICE, truncate=True))
        await fails(Code.IS_DIRECTORY, w.open_file(ROOT_INODE, 4))
        await fails(Code.NOT_FOUND, w.open_file(999_999, 4))

    play(scene)


# ---------------------------------------------------------------- length


@pytest.mark.parametrize("unlinked", [False, True])
def test_a_close_that_has_to_be_told_again_ends_no_session(unlinked: bool) -> None:
    """Another client has cut the file before these writes: they are somebody's until they count."""

    async def scene(w: World) -> None:
        f = await w.create(b"f")
        await w.settle(f.id, length=1000)
        await w.setattr(f.id, length=10)
        if unlinked:
            await w.unlink(b"f")
        early = await w.settle(f.id, length=1000, truncate_version=0, close=True)
        assert (early.length, early.truncate_version) == (10, 1)
        assert w.rows(keys.Prefix.SESSION)
        late = await w.settle(f.id, length=1000, truncate_version=1, close=True)
        assert late.length == 1000
        assert not w.rows(keys.Prefix.SESSION)

    play(scene)


def test_settle_takes_the_longest_length_of_this_truncate_version() -> None:
    async def scene(w: World) -> None:
        f = await w.create(b"f")
        assert (await w.settle(f.id, length=1000)).length == 1000
        settled = await w.settle(f.id, length=400)
        assert settled.length == 1000
        assert settled.mtime_ns > f.mtime_ns
        cut = await w.setattr(f.id, length=10)
        assert (cut.length, cut.truncate_version) == (10, 1)
        assert (await w.settle(f.id, length=1000, truncate_version=0)).length == 10  # stale
        assert (await w.settle(f.id, length=30, truncate_version=1)).length == 30
        grown = await w.setattr(f.id, length=5000, session=1)
        assert (grown.length, grown.truncate_version) == (5000, 1)
        timed = await w.settle(f.id, mtime_ns=7, atime_ns=8)
        assert (timed.mtime_ns, timed.atime_ns, timed.length) == (7, 8, 5000)
        await fails(Code.FILE_TOO_LARGE, w.settle(f.id, length=FILE_BYTES_MAX + 1))
        await fails(Code.FILE_TOO_LARGE, w.setattr(f.id, length=(CHUNK << 32) + 1))
        await fails(Code.INVALID, w.setattr(f.id, length=-1))
        await fails(Code.IS_DIRECTORY, w.setattr(ROOT_INODE, length=0))

    play(scene)


def test_durable_settle_survives_a_power_cut() -> None:
    async def scene(w: World) -> None:
        f = await w.create(b"f")
        await w.settle(f.id, length=1000, durable=True)
        await w.settle(f.id, length=2000)
        w.store.crash()  # type: ignore[attr-defined]
        w.boot()
        assert (await w.lookup(b"f")).length == 1000

    play(scene)


@pytest.mark.parametrize(
    ("length", "left", "asked"),
    [
        (0, {}, [("remove", 0)]),
        (CHUNK, {0: CHUNK}, [("remove", 1)]),
        (CHUNK + 5, {0: CHUNK, 1: 5}, [("remove", 2), ("truncate", 1, 5)]),
        (2 * CHUNK + 100, {0: CHUNK, 1: CHUNK, 2: 100}, [("end", 2)]),
        (9 * CHUNK, {0: CHUNK, 1: CHUNK, 2: 100}, [("end", 2)]),
    ],
)
def test_truncate_cuts_chunks(length: int, left: dict[int, int], asked: list[object]) -> None:
    async def scene(w: World) -> None:
        f = await w.create(b"f")
        w.chunks.put(f.id, CHUNK, CHUNK, 100)
        await w.settle(f.id, length=2 * CHUNK + 100)
        await w.setattr(f.id, length=length, session=1)
        assert w.chunks.of(f.id) == left
        assert [(entry[0], *entry[2:]) for entry in w.chunks.log] == asked
        assert w.rows(keys.Prefix.TRIM) == []

    play(scene)


@pytest.mark.parametrize("how", ["open", "create"])
def test_opening_with_truncation(how: str) -> None:
    async def scene(w: World) -> None:
        f = await w.create(b"f")
        w.chunks.put(f.id, CHUNK)
        await w.settle(f.id, length=CHUNK, close=True)
        if how == "open":
            opened = await w.open_file(f.id, 5, write=True, truncate=True)
        else:
            opened = await w.create(b"f", session=5, truncate=True)
        assert (opened.length, opened.truncate_version) == (0, 1)
        assert w.chunks.of(f.id) == {}
        again = await w.create(b"f", session=5, truncate=True)
        assert again.truncate_version == 1  # nothing to cut: no chunk is touched
        assert [entry[0] for entry in w.chunks.log] == ["remove", "end"]

    play(scene)


@pytest.mark.parametrize("how", ["setattr", "open", "create"])
def test_o2_o17_a_cut_takes_what_a_writer_elsewhere_never_told(how: str) -> None:
    """Truncating a file also removes what another writer, perhaps dead, wrote behind its end."""

    async def scene(w: World) -> None:
        f = await w.create(b"f")
        w.chunks.put(f.id, CHUNK, 100)  # written, and its length not settled yet
        wanted = {"setattr": 10, "open": 0, "create": 0}[how]
        if how == "setattr":
            cut = await w.setattr(f.id, length=wanted)
        elif how == "open":
            cut = await w.open_file(f.id, 5, write=True, truncate=True)
        else:
            cut = await w.create(b"f", session=5, truncate=True)
        assert w.chunks.of(f.id) == ({0: wanted} if wanted else {})
        assert (await w.settle(f.id, length=CHUNK + 100)).length == wanted  # too late
        assert (cut.length, cut.truncate_version) == (wanted, 1)

    play(scene)


def test_s1_r12_cuts_and_removals_are_stable_before_they_are_forgotten() -> None:
    """When the power of the storage fails, no chunk comes back that nobody would remove again."""

    async def scene(w: World) -> None:
        f, g = await w.create(b"f"), await w.create(b"g", session=2)
        for inode in (f, g):
            w.chunks.put(inode.id, CHUNK, CHUNK)
        await w.settle(f.id, length=2 * CHUNK)
        await w.setattr(f.id, length=10)
        w.chunks.cut_power()
        assert w.chunks.of(f.id) == {0: 10}
        await w.settle(g.id, session=2, close=True)
        await w.unlink(b"g")
        assert await w.context.collector.collect() == 1
        w.chunks.cut_power()
        assert w.chunks.of(g.id) == {}

    play(scene)


def test_s1_r12_cuts_and_removals_that_a_blackout_undoes_before_their_flush_are_repeated() -> None:
    """A flush answered by replicas that have lost them does not count."""

    async def scene(w: World) -> None:
        f, g = await w.create(b"f"), await w.create(b"g", session=2)
        for inode in (f, g):
            w.chunks.put(inode.id, CHUNK, CHUNK)
        await w.settle(f.id, length=2 * CHUNK)
        w.chunks.loses_next = True
        await w.setattr(f.id, length=10)
        assert w.chunks.of(f.id) == {0: 10}
        await w.settle(g.id, session=2, close=True)
        await w.unlink(b"g")
        w.chunks.loses_next = True
        assert await w.context.collector.collect() == 0
        assert await w.context.collector.collect() == 1
        w.chunks.cut_power()
        assert w.chunks.of(g.id) == {}
        assert w.chunks.of(f.id) == {0: 10}

    play(scene)


def test_o6_r12_a_power_cut_does_not_repeat_a_finished_cut() -> None:
    """What is written after a truncation was answered stays, also when the power fails then."""

    async def scene(w: World) -> None:
        f = await w.create(b"f")
        w.chunks.put(f.id, CHUNK)
        await w.settle(f.id, length=CHUNK)
        await w.setattr(f.id, length=0, session=1)
        w.chunks.put(f.id, 500)
        await w.context.close()
        w.store.crash()  # type: ignore[attr-defined]
        w.boot()
        await w.open()
        w.context.start()
        await w.open_file(f.id, 6)  # would wait for a cut
        assert w.chunks.of(f.id) == {0: 500}

    play(scene)


def test_o6_unfinished_trim_is_resumed_after_a_restart() -> None:
    """A truncation that a restart interrupted is finished."""

    async def scene(w: World) -> None:
        f = await w.create(b"f")
        w.chunks.put(f.id, CHUNK, CHUNK)
        await w.settle(f.id, length=2 * CHUNK)
        w.chunks.error = DISK
        await fails(Code.TIMEOUT, w.setattr(f.id, length=10))
        assert (await w.getattr(f.id)).length == 10
        await w.context.close()
        w.store.crash()  # type: ignore[attr-defined]  # the shrunk length was made stable first
        w.boot()
        await w.open()
        assert (await w.getattr(f.id)).length == 10
        w.chunks.error = None
        w.context.start()
        await until(lambda: not w.rows(keys.Prefix.TRIM))
        assert w.chunks.of(f.id) == {0: 10}

    play(scene)


def test_nothing_overtakes_a_pending_trim() -> None:
    """Else the cut would take what is written after the file shrank."""

    async def scene(w: World) -> None:
        f = await w.create(b"f")
        w.chunks.put(f.id, CHUNK, CHUNK)
        await w.settle(f.id, length=2 * CHUNK)
        w.chunks.gate = asyncio.Event()
        cutting = asyncio.ensure_future(w.setattr(f.id, length=10))
        await asyncio.sleep(0.01)
        others = [
            asyncio.ensure_future(call)
            for call in (
                w.open_file(f.id, 5),
                w.settle(f.id, length=20, truncate_version=1),
                w.setattr(f.id, length=100),
                w.setattr(f.id, length=5),
            )
        ]
        await asyncio.sleep(0.02)
        assert not cutting.done()
        assert not any(other.done() for other in others)
        w.chunks.gate.set()
        await asyncio.gather(cutting, *others)
        assert (await w.getattr(f.id)).length == 5
        assert w.chunks.of(f.id) == {0: 5}

    play(scene)


def test_a_cancelled_truncate_goes_on() -> None:
    async def scene(w: World) -> None:
        f = await w.create(b"f")
        w.chunks.put(f.id, CHUNK)
        await w.settle(f.id, length=CHUNK)
        w.chunks.gate = asyncio.Event()
        request = calls.SetattrRequest(ROOT, w.rid(), f.id, length=0)
        cutting = asyncio.ensure_future(files.setattr_(w.context, request))
        await asyncio.sleep(0.01)
        cutting.cancel()
        retry = asyncio.ensure_future(files.setattr_(w.context, request))
        await asyncio.sleep(0.01)
        assert not retry.done()  # the remembered reply waits for the cut as well
        w.chunks.gate.set()
        assert (await retry).inode.truncate_version == 1
        assert w.chunks.of(f.id) == {}
        assert len(w.chunks.log) == 1

    play(scene)


# ---------------------------------------------------------------- deletion


async def collected(w: World) -> None:
    async with asyncio.timeout(3):
        while w.rows(keys.Prefix.DELETED):
            await w.context.collector.collect()
            await asyncio.sleep(0.01)


def test_unlinked_but_open_files_live_until_the_last_close() -> None:
    async def scene(w: World) -> None:
        f = await w.create(b"f", session=1)
        await w.open_file(f.id, 2, write=False)
        w.chunks.put(f.id, CHUNK)
        await w.settle(f.id, 1, length=CHUNK)
        await w.set_xattr(f.id, b"user.a", b"1")
        await w.unlink(b"f")
        assert (await w.getattr(f.id)).nlink == 0
        await w.settle(f.id, 1, length=CHUNK + 5)  # still writable
        await fails(Code.NOT_FOUND, w.link(f.id, b"g"))
        await w.settle(f.id, 1, close=True)
        assert (await w.getattr(f.id)).length == CHUNK + 5  # still open for reading
        await w.context.collector.collect()
        assert w.chunks.of(f.id) == {0: CHUNK}
        last = await w.settle(f.id, 2, close=True)
        assert last.nlink == 0
        await fails(Code.NOT_FOUND, w.getattr(f.id))
        await collected(w)
        assert w.chunks.chunks == {}
        assert w.rows(keys.Prefix.XATTR) == []

    play(scene)


def test_closing_keeps_a_named_file() -> None:
    async def scene(w: World) -> None:
        f = await w.create(b"f")
        closed = await w.settle(f.id, length=5, close=True)
        assert (closed.length, closed.nlink) == (5, 1)
        assert w.rows(keys.Prefix.SESSION) == []

    play(scene)


def test_s1_o6_chunks_go_only_after_the_deletion_is_stable() -> None:
    """Chunks of a deleted file go only after the deletion is stable."""

    async def scene(w: World) -> None:
        f = await w.file(b"f")
        await w.unlink(b"f")
        assert w.store.unsynced_count > 0  # type: ignore[attr-defined]
        unsynced: list[int] = []
        original = w.chunks.remove_chunks

        async def watched(*args: object) -> object:
            unsynced.append(w.store.unsynced_count)  # type: ignore[attr-defined]
            return await original(*args)  # type: ignore[arg-type]

        w.chunks.remove_chunks = watched  # type: ignore[method-assign, assignment]
        await collected(w)
        assert unsynced == [0]
        assert w.chunks.log == [("remove", f.id, 0)]

    play(scene)


def test_o6_o20_collection_is_retried_and_survives_a_restart() -> None:
    """Collection of deleted files is taken up again after failures and restarts."""

    async def scene(w: World) -> None:
        made = [await w.file(b"f%d" % i) for i in range(200)]
        for i, f in enumerate(made):
            w.chunks.put(f.id, 10)
            await w.unlink(b"f%d" % i)
        w.chunks.error = DISK
        assert await w.context.collector.collect() == 0
        assert len(w.rows(keys.Prefix.DELETED)) == 200
        asked = len(w.chunks.log)
        assert await w.context.collector.collect() == 0
        assert len(w.chunks.log) == asked  # not due yet
        w.chunks.error = None
        w.env.skipped_ns += 60 * SECOND
        assert await w.context.collector.collect() == 200
        assert w.chunks.chunks == {}
        last = await w.file(b"last")
        w.chunks.put(last.id, 10)
        await w.unlink(b"last")
        w.boot()
        await w.open()
        w.context.start()
        await until(lambda: not w.chunks.chunks)

    play(scene)


def test_s2_o11_a_late_cut_cannot_bring_a_deleted_chunk_back() -> None:
    """A late truncation cannot bring a deleted chunk back."""

    async def scene(w: World) -> None:
        f = await w.create(b"f")
        w.chunks.put(f.id, CHUNK)
        await w.settle(f.id, length=CHUNK)
        w.chunks.gate = asyncio.Event()
        cutting = asyncio.ensure_future(w.setattr(f.id, length=10))
        await asyncio.sleep(0.01)
        await w.unlink(b"f")
        w.store.write([(keys.session_key(f.id, 1), None)])
        other = w.engine.begin()  # the session's end, by hand: settle would wait for the cut
        inode = await files.load_inode(other, f.id)
        await files.destroy(other, inode, 1)
        await other.commit()
        collecting = asyncio.ensure_future(w.context.collector.collect())
        await asyncio.sleep(0.02)
        assert not collecting.done()
        w.chunks.gate.set()
        await asyncio.gather(cutting, collecting)
        assert w.chunks.chunks == {}

    play(scene)


def sweeper_of(w: World, grace_ns: int = 30 * SECOND) -> SessionSweeper:
    context = w.context
    return SessionSweeper(
        w.env,
        w.engine,
        context.collector,
        w.chunks,
        context.trims,
        context.clients,
        context.tenure,
        grace_ns,
    )


def test_c9_o20_sessions_of_vanished_clients_end_after_the_grace_time() -> None:
    """Sessions of clients that vanished end after the grace time, and their files are collected."""

    async def scene(w: World) -> None:
        sweeper = sweeper_of(w)
        f = await w.create(b"f")
        await w.unlink(b"f")
        assert await sweeper.sweep() == 0
        w.env.skipped_ns += 100 * SECOND
        assert await sweeper.sweep() == 0  # alive
        w.routing = make_snapshot(clients={CLIENT: False})
        assert await sweeper.sweep() == 0
        w.env.skipped_ns += 20 * SECOND
        assert await sweeper.sweep() == 0
        w.routing = make_snapshot()  # back again: the time begins anew
        assert await sweeper.sweep() == 0
        w.routing = make_snapshot(clients={CLIENT + 1: True})
        w.env.skipped_ns += 20 * SECOND
        assert await sweeper.sweep() == 0
        w.env.skipped_ns += 31 * SECOND
        assert await sweeper.sweep() == 1
        await fails(Code.NOT_FOUND, w.getattr(f.id))
        assert len(w.rows(keys.Prefix.DELETED)) == 1

    play(scene)


def test_c9_nobody_is_gone_while_routing_may_be_old() -> None:
    """A server that is out of touch with mgmtd ends no sessions, and counts anew afterwards."""

    async def scene(w: World) -> None:
        fresh = True
        w.context.clients = Clients(lambda: w.routing, lambda: fresh)
        sweeper = sweeper_of(w)
        await w.create(b"f")
        w.routing = make_snapshot(clients={CLIENT + 1: True})
        assert await sweeper.sweep() == 0
        fresh = False
        w.env.skipped_ns += 100 * SECOND
        assert await sweeper.sweep() == 0
        fresh = True
        assert await sweeper.sweep() == 0
        w.env.skipped_ns += 31 * SECOND
        assert await sweeper.sweep() == 1

    play(scene)


def test_c9_a_client_that_opens_its_files_anew_is_not_gone() -> None:
    """While its old sessions are just being ended: the one that it was given stays."""

    async def scene(w: World) -> None:
        sweeper = sweeper_of(w)
        f = await w.create(b"f", session=5)
        w.routing = make_snapshot(clients={CLIENT + 1: True})
        assert await sweeper.sweep() == 0
        w.env.skipped_ns += 31 * SECOND
        w.chunks.gate = asyncio.Event()  # its file is being measured
        sweeping = asyncio.ensure_future(sweeper.sweep())
        await until(lambda: ("end", f.id, 0) in w.chunks.log)
        await w.open_file(f.id, 5, write=True)
        w.chunks.gate.set()
        assert await sweeping == 0
        assert len(w.rows(keys.Prefix.SESSION)) == 1

    play(scene)


def test_o2_c9_what_a_vanished_writer_was_told_is_written_stays_readable() -> None:
    """When a client dies after a write behind the old end, the file has the new length."""

    async def scene(w: World) -> None:
        sweeper = sweeper_of(w, 1)
        f = await w.create(b"f")
        assert f.layout is not None
        w.chunks.put(f.id, f.layout.chunk_bytes, 4711)
        w.routing = make_snapshot(clients={CLIENT + 1: True})
        assert await sweeper.sweep() == 0
        w.env.skipped_ns += SECOND
        w.chunks.error = EmberfsError(Code.TIMEOUT, "the chain is away")
        assert await sweeper.sweep() == 0  # it waits: nothing is decided blindly
        assert len(w.rows(keys.Prefix.SESSION)) == 1
        w.chunks.error = None
        assert await sweeper.sweep() == 1
        assert (await w.getattr(f.id)).length == f.layout.chunk_bytes + 4711
        assert len(w.rows(keys.Prefix.SESSION)) == 0

    play(scene)


# ---------------------------------------------------------------- attributes


def test_who_may_change_what() -> None:
    async def scene(w: World) -> None:
        d = (await w.mkdir(b"d", mode=0o777)).id
        f = (await w.file(b"f", d, ALICE, mode=0o666)).id
        refused = Code.NOT_PERMITTED
        await fails(refused, w.setattr(f, BOB, mode=0o600))
        await fails(refused, w.setattr(f, BOB, mode=0o666))  # nor the one it has: from the model
        await fails(refused, w.setattr(f, BOB, uid=BOB.uid))
        await fails(refused, w.setattr(f, ALICE, uid=BOB.uid))
        await fails(refused, w.setattr(f, ALICE, gid=BOB.gid))
        await fails(refused, w.setattr(f, BOB, mtime_ns=5))
        assert (await w.setattr(f, ALICE, gid=50)).gid == 50
        assert (await w.setattr(f, ALICE, uid=ALICE.uid)).uid == ALICE.uid
        touched = await w.setattr(f, BOB, mtime_ns=-1, atime_ns=-1)  # he may write
        assert abs(touched.mtime_ns - w.env.wall_ns()) < 10 * SECOND
        await fails(refused, w.setattr(f, BOB, mtime_ns=-1))  # both or none: utimensat(2)
        timed = await w.setattr(f, ALICE, mtime_ns=123_456_789, atime_ns=0)
        assert (timed.mtime_ns, timed.atime_ns) == (123_456_789, 0)
        assert timed.ctime_ns > 123_456_789
        await w.setattr(f, ALICE, mode=0o400)
        await fails(Code.ACCESS, w.setattr(f, BOB, mtime_ns=-1, atime_ns=-1))
        await fails(Code.ACCESS, w.setattr(f, BOB, length=0))
        assert (await w.setattr(f, uid=BOB.uid, gid=9)).uid == BOB.uid
        link = await w.symlink(b"l", b"t")
        await fails(Code.UNSUPPORTED, w.setattr(link.id, mode=0o600))
        await fails(Code.NOT_FOUND, w.setattr(999_999, mode=0o600))

    play(scene)


def test_set_id_bits_go_with_owners_and_writes() -> None:
    async def scene(w: World) -> None:
        async def fresh(name: bytes) -> int:
            f = (await w.create(name, session=1)).id
            await w.setattr(f, uid=ALICE.uid, gid=50)
            await w.setattr(f, mode=0o6775)
            return f

        async def mode(f: int) -> int:
            return stat.S_IMODE((await w.getattr(f)).mode)

        f = await fresh(b"a")
        await w.setattr(f, uid=BOB.uid)
        assert await mode(f) == 0o775
        f = await fresh(b"b")
        await w.settle(f, 1, length=5)  # the session is root's
        assert await mode(f) == 0o6775
        await w.open_file(f, 2, ALICE, write=True)
        await w.settle(f, 2, length=9)
        assert await mode(f) == 0o775
        f = await fresh(b"c")
        await w.setattr(f, ALICE, length=1)
        assert await mode(f) == 0o775
        f = await fresh(b"d")
        await fails(Code.NOT_PERMITTED, w.setattr(f, calls.Caller(3, 50), mode=0o775))
        f = await fresh(b"e")
        await w.setattr(f, gid=BOB.gid)
        await w.setattr(f, ALICE, mode=0o2775)  # she is no member: no set-group-id
        assert await mode(f) == 0o775
        await w.setattr(f, mode=0o2764)
        await w.setattr(f, gid=50)
        assert await mode(f) == 0o2764  # without group execution it is no privilege

    play(scene)


def test_ftruncate_needs_only_a_write_session() -> None:
    async def scene(w: World) -> None:
        d = (await w.mkdir(b"d", mode=0o777)).id
        f = await w.create(b"f", d, ALICE, mode=0o444, session=8)
        await w.open_file(f.id, 9, ALICE)
        await fails(Code.ACCESS, w.setattr(f.id, ALICE, length=9))
        await fails(Code.ACCESS, w.setattr(f.id, ALICE, length=9, session=9))
        assert (await w.setattr(f.id, ALICE, length=9, session=8)).length == 9

    play(scene)


# ---------------------------------------------------------------- xattrs, space


def test_xattrs() -> None:
    async def scene(w: World) -> None:
        f = (await w.file(b"f", mode=0o644)).id
        await w.set_xattr(f, b"user.b", b"\0\xff")
        await w.set_xattr(f, b"user.a", b"")
        await w.set_xattr(f, b"trusted.t", b"1")
        await w.set_xattr(f, b"security.selinux", b"1")
        assert (await w.xattr(f, b"user.b")).value == b"\0\xff"
        assert (await w.xattr(f)).names == (
            b"security.selinux",
            b"trusted.t",
            b"user.a",
            b"user.b",
        )
        assert b"trusted.t" not in (await w.xattr(f, who=ALICE)).names
        await fails(Code.NO_ATTRIBUTE, w.xattr(f, b"trusted.t", who=ALICE))
        await fails(Code.NO_ATTRIBUTE, w.xattr(f, b"user.none"))
        await fails(Code.NO_ATTRIBUTE, w.set_xattr(f, b"user.none", None))
        await fails(Code.NO_ATTRIBUTE, w.set_xattr(f, b"user.none", b"1", 2))
        await fails(Code.EXISTS, w.set_xattr(f, b"user.a", b"1", 1))
        await fails(Code.ACCESS, w.set_xattr(f, b"user.a", b"1", who=ALICE))
        await fails(Code.NOT_PERMITTED, w.set_xattr(f, b"security.x", b"1", who=ALICE))
        await fails(Code.INVALID, w.set_xattr(f, b"system.posix_acl_access", b"1"))
        await fails(Code.RANGE, w.set_xattr(f, b"user." + b"n" * 251, b"1"))
        await fails(Code.TRANSACTION_TOO_LARGE, w.set_xattr(f, b"user.c", bytes(65_537)))
        await w.set_xattr(f, b"user.c", bytes(65_536))
        await w.set_xattr(f, b"user.a", None)
        assert b"user.a" not in (await w.xattr(f)).names
        link = await w.symlink(b"l", b"t")
        await fails(Code.NOT_PERMITTED, w.set_xattr(link.id, b"user.a", b"1"))
        for i in range(300):
            name = b"user.%03d" % i + b"x" * 246
            try:
                await w.set_xattr(f, name, b"")
            except EmberfsError as problem:
                assert problem.code == Code.NO_SPACE  # noqa: PT017
                break
        assert sum(len(n) + 1 for n in (await w.xattr(f)).names) <= 65_536
        await w.unlink(b"f")
        assert w.rows(keys.Prefix.XATTR) == []

    play(scene)


def test_statfs_counts_the_smallest_replica_of_each_chain() -> None:
    async def scene(w: World) -> None:
        serving, offline = PublicState.SERVING, PublicState.OFFLINE
        w.routing = snapshot(
            chain(1, serving, serving, serving), chain(2, serving, offline), chain(3, offline)
        )
        answer = await statfs(w.context, calls.StatfsRequest())
        # Members on node n use 100 n of 1000 bytes.
        assert (answer.total_bytes, answer.free_bytes) == (3000, 700 + 900 + 900)
        assert answer.inodes == 1
        await w.mkdir(b"d")
        assert (await statfs(w.context, calls.StatfsRequest())).inodes == 2

    play(scene)


def test_the_clock_of_the_world_is_real() -> None:
    assert abs(World().env.now_ns() - RealEnv().now_ns()) < SECOND


def test_create_of_an_existing_file_to_read_and_write_needs_both_rights() -> None:
    """open(2) with O_CREAT | O_RDWR: found by the model; only writing was looked at."""

    async def scene(w: World) -> None:
        await w.setattr(ROOT_INODE, mode=0o777)
        await w.file(b"f", who=ALICE, mode=0o222)
        await fails(Code.ACCESS, w.create(b"f", who=BOB, read=True))
        await w.create(b"f", who=BOB)
        await w.file(b"g", who=ALICE, mode=0o444)
        await fails(Code.ACCESS, w.create(b"g", who=BOB, read=True))
        await w.create(b"g", who=BOB, read=True, write=False)

    play(scene)
