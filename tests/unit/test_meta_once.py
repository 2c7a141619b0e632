"""Retried mutating calls, restarts, and storms of concurrent calls."""

import asyncio
import random
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from emberfs.kv import keys
from emberfs.kv.rocks import RocksStore
from emberfs.kv.transaction import Transaction
from emberfs.meta import files, namespace, rename, replies, xattr
from emberfs.meta.context import Context, Policy
from emberfs.meta.forgetting import BATCH_ROWS
from emberfs.meta.format import open_file_system
from emberfs.meta.rename import EXCHANGE
from emberfs.proto import meta_calls as calls
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ROOT_INODE, SECOND, InodeId, SessionId
from unit.meta_world import BOB, CHUNK, CLIENT, ROOT, World, fails, play

ID = calls.RequestId(CLIENT, 900)
S5 = SessionId(5)

Call = Callable[[World, InodeId], tuple[Callable[..., Awaitable[Any]], Any]]
CALLS: dict[str, Call] = {
    "setattr": lambda w, f: (files.setattr_, calls.SetattrRequest(ROOT, ID, f, length=1)),
    "create": lambda w, f: (
        files.create,
        calls.CreateRequest(ROOT, ID, ROOT_INODE, b"new", 0o644, S5, write=True, exclusive=True),
    ),
    "mkdir": lambda w, f: (
        namespace.mknod,
        calls.MknodRequest(ROOT, ID, ROOT_INODE, b"new", stat.S_IFDIR | 0o755),
    ),
    "symlink": lambda w, f: (
        namespace.symlink,
        calls.SymlinkRequest(ROOT, ID, ROOT_INODE, b"new", b"t"),
    ),
    "link": lambda w, f: (namespace.link, calls.LinkRequest(ROOT, ID, f, ROOT_INODE, b"new")),
    "unlink": lambda w, f: (
        namespace.remove,
        calls.RemoveRequest(ROOT, ID, ROOT_INODE, b"f", directory=False),
    ),
    "rmdir": lambda w, f: (
        namespace.remove,
        calls.RemoveRequest(ROOT, ID, ROOT_INODE, b"d", directory=True),
    ),
    "rename": lambda w, f: (
        rename.rename,
        calls.RenameRequest(ROOT, ID, ROOT_INODE, b"f", ROOT_INODE, b"g"),
    ),
    "exchange": lambda w, f: (
        rename.rename,
        calls.RenameRequest(ROOT, ID, ROOT_INODE, b"f", ROOT_INODE, b"d", EXCHANGE),
    ),
    "open": lambda w, f: (
        files.open_,
        calls.OpenRequest(ROOT, ID, f, S5, read=True, write=True, truncate=True),
    ),
    "settle": lambda w, f: (
        files.settle,
        calls.SettleRequest(ID, f, SessionId(1), length=900, close=True),
    ),
    "set_xattr": lambda w, f: (
        xattr.set_xattr,
        calls.SetXattrRequest(ROOT, ID, f, b"user.new", b"1", 1),
    ),
    "remove_xattr": lambda w, f: (
        xattr.set_xattr,
        calls.SetXattrRequest(ROOT, ID, f, b"user.old", None),
    ),
}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_c9_a_retry_answers_the_same_and_does_nothing_twice(name: str, restart: bool) -> None:
    """Every metadata call that is repeated answers the same and does nothing twice."""

    async def scene(w: World) -> None:
        f = await w.create(b"f")
        await w.settle(f.id, length=100)
        await w.mkdir(b"d")
        await w.set_xattr(f.id, b"user.old", b"1")
        handler, request = CALLS[name](w, f.id)
        first = await handler(w.context, request)
        before = w.store.scan(b"", b"\xff")
        if restart:
            w.boot()
            await w.open()
        assert await handler(w.context, request) == first
        of_a_life = (keys.INODE_BLOCK_KEY, keys.LIFE_KEY)
        after = [row for row in w.store.scan(b"", b"\xff") if row[0] not in of_a_life]
        assert after == [row for row in before if row[0] not in of_a_life]

    play(scene)


def test_retries_of_a_close_that_collected_the_file() -> None:
    async def scene(w: World) -> None:
        f = await w.create(b"f")
        await w.unlink(b"f")
        request = calls.SettleRequest(ID, f.id, SessionId(1), close=True)
        first = await files.settle(w.context, request)
        await w.context.collector.collect()
        assert await files.settle(w.context, request) == first
        await fails(Code.NOT_FOUND, w.settle(f.id, close=True))

    play(scene)


def test_c9_duplicates_in_flight_at_the_same_time(yielding: None) -> None:
    """Two copies of one call at the same time have one effect."""

    async def scene(w: World) -> None:
        request = calls.MknodRequest(ROOT, ID, ROOT_INODE, b"new", stat.S_IFDIR | 0o755)
        answers = await asyncio.gather(*(namespace.mknod(w.context, request) for _ in range(5)))
        assert all(answer == answers[0] for answer in answers)
        assert w.engine.conflicts > 0

    play(scene)


def test_an_id_is_good_for_one_method_only() -> None:
    async def scene(w: World) -> None:
        request = calls.MknodRequest(ROOT, ID, ROOT_INODE, b"new", stat.S_IFDIR | 0o755)
        await namespace.mknod(w.context, request)
        wrong = calls.RemoveRequest(ROOT, ID, ROOT_INODE, b"new", directory=True)
        await fails(Code.INVALID, namespace.remove(w.context, wrong))

    play(scene)


def test_c9_a_late_copy_of_a_call_without_effect_has_none() -> None:
    """A copy of a failed call that was held up does nothing when it would succeed by now."""

    async def scene(w: World) -> None:
        wanted = calls.RemoveRequest(ROOT, ID, ROOT_INODE, b"x", directory=False)
        await fails(Code.NOT_FOUND, namespace.remove(w.context, wanted))
        f = await w.file(b"x")
        await fails(Code.NOT_FOUND, namespace.remove(w.context, wanted))
        await w.link(f.id, b"y")
        again = calls.RequestId(CLIENT, 901)
        move = calls.RenameRequest(ROOT, again, ROOT_INODE, b"x", ROOT_INODE, b"y")
        await rename.rename(w.context, move)  # two names of one file: nothing to do
        await w.unlink(b"y")
        await rename.rename(w.context, move)
        assert await w.names() == [b"x"]

    play(scene)


def test_c9_a_copy_that_fails_while_another_succeeds(yielding: None) -> None:
    """Of two copies at the same time both tell what took effect, in whatever order they end."""

    async def scene(w: World) -> None:
        for turn in range(20):
            name, number = b"n%d" % turn, calls.RequestId(CLIENT, 1000 + turn)
            wanted = calls.RemoveRequest(ROOT, number, ROOT_INODE, name, directory=False)
            copies = (namespace.remove(w.context, wanted) for _ in range(3))
            ended = await asyncio.gather(*copies, w.file(name), return_exceptions=True)
            told = {isinstance(one, EmberfsError) for one in ended[:3]}
            assert len(told) == 1
            assert (name in await w.names()) == told.pop()

    play(scene)


def test_answers_without_effect_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "FRUITLESS_MAX", 3)

    async def scene(w: World) -> None:
        for _ in range(5):
            await fails(Code.NOT_FOUND, w.unlink(b"x"))
        assert len(w.context.replies._fruitless) == 3

    play(scene)


def test_o22_replies_are_forgotten_after_their_time_and_not_before() -> None:
    """Remembered replies are forgotten after their time: the store stays bounded."""

    async def scene(w: World) -> None:
        for i in range(BATCH_ROWS + 10):
            await w.file(b"old%d" % i)
        w.env.skipped_ns += 599 * SECOND
        assert await sweep(w) == 0
        w.boot()  # what an earlier life remembered is kept as long again
        await w.open()
        w.env.skipped_ns += 300 * SECOND
        await w.file(b"young")
        assert await sweep(w) == 0
        w.env.skipped_ns += 599 * SECOND
        assert await sweep(w) == 0
        w.env.skipped_ns += 2 * SECOND
        assert await sweep(w) == BATCH_ROWS
        assert await sweep(w) == 10  # and the young one, by now
        assert await sweep(w) == 0
        assert len(w.rows(keys.Prefix.REPLY)) == 0
        assert len(w.rows(keys.Prefix.MARK)) == len(w.rows(keys.Prefix.REPLY_AGE)) == 1
        w.env.skipped_ns += 25 * 3600 * SECOND
        assert await sweep(w) == 1
        assert len(w.rows(keys.Prefix.MARK)) == len(w.rows(keys.Prefix.REPLY_AGE)) == 0

    play(scene)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_c9_a_copy_at_another_server_does_what_the_retry_was_told(elsewhere: bool) -> None:
    """A failed call leaves a record if it was tried elsewhere before, and only then."""

    async def scene(w: World) -> None:
        await w.mkdir(b"d")
        await w.mkdir(b"full", (await w.lookup(b"d")).id)
        other = Context(w.env, w.engine, w.chunks, lambda: w.routing, Policy(CHUNK, 16))
        retry = calls.RequestId(CLIENT, 900, elsewhere)
        request = calls.RemoveRequest(ROOT, retry, ROOT_INODE, b"d", directory=True)
        await fails(Code.NOT_EMPTY, namespace.remove(w.context, request))
        await w.rmdir(b"full", (await w.lookup(b"d")).id)
        first = calls.RequestId(CLIENT, 900)
        copy = calls.RemoveRequest(ROOT, first, ROOT_INODE, b"d", directory=True)
        if elsewhere:
            await fails(Code.NOT_EMPTY, namespace.remove(other, copy))
            await w.lookup(b"d")
        else:  # its client has never asked anybody else: there is no such copy
            await namespace.remove(other, copy)

    play(scene)


async def sweep(w: World) -> int:
    return await w.context.replies.forgetting.sweep()


def test_c9_a_copy_of_a_call_that_was_forgotten_is_refused() -> None:
    """It may have waited at another server; its client has gone on long ago."""

    async def scene(w: World) -> None:
        old = calls.RequestId(CLIENT, w.sequence + 1)
        await w.file(b"f")
        await w.unlink(b"f")
        w.env.skipped_ns += 601 * SECOND
        assert await sweep(w) > 0
        again = calls.MknodRequest(ROOT, old, ROOT_INODE, b"f", 0o644)
        await fails(Code.STALE, namespace.mknod(w.context, again))
        await fails(Code.NOT_FOUND, w.lookup(b"f"))
        await w.file(b"f")

    play(scene)


# ---------------------------------------------------------------- interleaving


@pytest.fixture
def yielding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let other tasks in at every read, as a remote store would: transactions now conflict."""
    get, get_range = Transaction.get, Transaction.get_range

    async def slow_get(self: Transaction, *args: Any, **options: Any) -> bytes | None:
        await asyncio.sleep(0)
        return await get(self, *args, **options)

    async def slow_range(self: Transaction, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(0)
        return await get_range(self, *args, **options)

    monkeypatch.setattr(Transaction, "get", slow_get)
    monkeypatch.setattr(Transaction, "get_range", slow_range)


@pytest.mark.parametrize("seed", range(4))
def test_o5_o11_storm_keeps_every_invariant(yielding: None, seed: int) -> None:
    """A storm of conflicting metadata calls keeps every invariant of the tree.

    Few names, many callers, every kind of call; `play` checks the records afterwards.
    """
    dice = random.Random(seed)
    names = [b"a", b"b", b"c"]

    async def directory(w: World) -> int:
        at = ROOT_INODE
        for _ in range(dice.randrange(3)):
            rows = [r for r in (await w.readdir(at)).rows if stat.S_ISDIR(r.mode)]
            if rows:
                at = dice.choice(rows).id
        return at

    async def one(w: World, session: int) -> None:
        here, there = await directory(w), await directory(w)
        name, other = dice.choice(names), dice.choice(names)
        act = dice.randrange(8)
        if act == 0:
            await w.mkdir(name, here)
        elif act == 1:
            made = await w.create(name, here, session=session)
            await w.settle(made.id, session, length=dice.randrange(99), close=dice.random() < 0.8)
        elif act == 2:
            await w.unlink(name, here)
        elif act == 3:
            await w.rmdir(name, here)
        elif act == 4:
            await w.link((await w.lookup(name, here)).id, other, there)
        elif act == 5:
            found = await w.lookup(name, here)
            await w.setattr(found.id, length=dice.randrange(50))
        else:
            flags = dice.choice([0, 0, 1, 2])
            await w.rename(name, other, here, there, flags)

    async def caller(w: World, number: int) -> None:
        for i in range(25):
            try:
                await one(w, number * 1000 + i + 1)
            except EmberfsError as problem:
                assert problem.code not in (Code.INTERNAL, Code.CONFLICT)  # noqa: PT017

    async def scene(w: World) -> None:
        await asyncio.gather(*(caller(w, number) for number in range(6)))
        assert w.engine.conflicts > 0
        reached = set()
        todo: list[int] = [ROOT_INODE]
        while todo:  # the tree is one: no directory was cut off in a loop
            at = todo.pop()
            assert at not in reached
            reached.add(at)
            todo += [r.id for r in (await w.readdir(at)).rows if stat.S_ISDIR(r.mode)]
        made = [k for k, v in w.rows(keys.Prefix.INODE) if stat.S_ISDIR(_mode(v))]
        assert len(made) == len(reached)

    play(scene)


def _mode(value: bytes) -> int:
    from emberfs.meta import schema

    return schema.INODE.decode(value).mode


# ---------------------------------------------------------------- first start, crashes


def test_r11_a_store_of_another_cluster_is_refused() -> None:
    """A metadata store of another cluster is refused at the start."""

    async def scene(w: World) -> None:
        other = open_file_system(w.engine, "other", uid=0, gid=0, now_ns=1)
        await fails(Code.WRONG_CLUSTER, other)
        assert not await open_file_system(w.engine, "test", uid=5, gid=5, now_ns=1)
        root = await w.getattr(ROOT_INODE)
        assert (root.mode, root.uid, root.nlink) == (stat.S_IFDIR | 0o755, 0, 2)

    play(scene)


def test_corrupt_records_are_one_clear_error() -> None:
    async def scene(w: World) -> None:
        f = await w.file(b"f")
        good = w.store.get(keys.inode_key(f.id))
        for bad in (b"", b"\xc1", b"\x93\x01", b"\xff" * 40):
            w.store.write([(keys.inode_key(f.id), bad)])
            await fails(Code.INTERNAL, w.getattr(f.id))
            await fails(Code.INTERNAL, w.lookup(b"f"))
        w.store.write([(keys.inode_key(f.id), good)])

    play(scene)


def test_r12_a_power_cut_leaves_a_state_that_holds_together() -> None:
    """A power cut at any point leaves a tree that holds together.

    Whatever suffix of the transactions is lost.
    """

    async def scene(w: World) -> None:
        dice = random.Random(5)
        for i in range(40):
            f = await w.create(b"f%d" % i, session=i + 1)
            await w.settle(f.id, i + 1, length=dice.randrange(1000), durable=i == 10)
            if i % 3 == 0:
                await w.unlink(b"f%d" % i)
            await w.settle(f.id, i + 1, close=True)
        w.store.crash(keep=dice.randrange(40))  # type: ignore[attr-defined]
        w.check()
        w.boot()
        await w.open()
        assert b"f10" in await w.names()

    play(scene)


_DIES = """
import asyncio, os, sys
from emberfs.kv.rocks import RocksStore
from unit.meta_world import World
async def main():
    w = World(RocksStore(sys.argv[1]))
    await w.open()
    for i in range(200):
        f = await w.create(b"f%d" % i, session=i + 1)
        await w.settle(f.id, i + 1, length=i, close=True)
        if i % 4 == 0:
            await w.unlink(b"f%d" % i)
    os._exit(9)
asyncio.run(main())
"""


def test_acknowledged_calls_survive_the_death_of_the_process(tmp_path: Path) -> None:
    path = str(tmp_path / "kv")
    tests = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", _DIES, path],
        capture_output=True,
        text=True,
        timeout=20,
        env={"PYTHONPATH": tests},
    )
    assert done.returncode == 9, done.stderr
    store = RocksStore(path)

    async def scene(w: World) -> None:
        assert sorted(await w.names()) == sorted(b"f%d" % i for i in range(200) if i % 4)
        for row in (await w.readdir()).rows:
            assert row.inode is not None
            assert row.inode.length == int(row.name[1:])
        w.sequence = 100_000  # another client life: request ids are not used again
        await w.file(b"next")
        await fails(Code.ACCESS, w.file(b"x", who=BOB))

    play(scene, store)
    store.close()
