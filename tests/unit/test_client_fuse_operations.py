"""FUSE handlers called directly, on a cluster in memory: errors, deadlines, caching, handles."""

import asyncio
import errno
import os
import stat
from types import SimpleNamespace

import pyfuse3
import pytest

from emberfs.client import fuse_operations
from emberfs.client.fuse_operations import CachePolicy, EmberOperations
from emberfs.proto.errors import MEANINGS, Code, EmberfsError
from emberfs.proto.ids import MS
from emberfs.runtime.real import RealEnv
from semantics.memory_cluster import MemoryFiles, MemoryMetadata

ROOT = pyfuse3.ROOT_INODE
CALLER = SimpleNamespace(uid=0, gid=0, pid=1, umask=0)
USER = SimpleNamespace(uid=1000, gid=1000, pid=0, umask=0)


class World:
    """Handlers and what they stand on."""

    def __init__(self, **policy):
        self.env = RealEnv()
        self.metadata = MemoryMetadata(self.env)
        self.files = MemoryFiles(self.metadata)
        self.operations = EmberOperations(
            self.env, self.metadata, self.files, CachePolicy(**policy)
        )

    async def create(self, name=b"f", flags=os.O_RDWR, content=b"", context=CALLER):
        info, entry = await self.operations.create(ROOT, name, 0o644, flags, context)
        if content:
            await self.operations.write(info.fh, 0, content)
        return info, entry.st_ino


@pytest.fixture(autouse=True)
def dropped(monkeypatch):
    """Attribute invalidations that would go to the kernel."""
    found = []
    monkeypatch.setattr(
        pyfuse3, "invalidate_inode", lambda inode, attr_only=False: found.append(inode)
    )
    return found


def run(work):
    asyncio.run(asyncio.wait_for(work, 10))


def refused(number):
    return pytest.raises(pyfuse3.FUSEError, match=os.strerror(number).split(" ")[0])


# ---------------------------------------------------------------- errors and deadlines


@pytest.mark.parametrize("code", list(Code))
def test_every_code_becomes_its_errno(code) -> None:
    async def work():
        world = World()
        world.metadata.faults["statfs"] = EmberfsError(code, "told")
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await world.operations.statfs(CALLER)
        assert caught.value.errno == MEANINGS[code].errno
        name = errno.errorcode[caught.value.errno]
        assert world.operations.metrics.operation("statfs").errors == {name: 1}

    run(work())


def test_inode_that_is_gone_is_looked_up_anew() -> None:
    """ESTALE: the kernel asks for the name again, which may lead to another file by now."""

    async def work():
        operations = World().operations
        for call in (
            lambda: operations.getattr(999, CALLER),
            lambda: operations.open(999, os.O_RDONLY, CALLER),
        ):
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await call()
            assert caught.value.errno == errno.ESTALE

    run(work())


def test_unexpected_exception_is_eio_with_traceback(caplog) -> None:
    async def work():
        world = World()
        world.metadata.faults["getattr"] = ZeroDivisionError("a bug")
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await world.operations.getattr(ROOT, CALLER)
        assert caught.value.errno == errno.EIO
        del world.metadata.faults["getattr"]
        await world.operations.getattr(ROOT, CALLER)

    run(work())
    assert "ZeroDivisionError: a bug" in caplog.text


def test_deadline_gives_etimedout_and_the_worker_lives() -> None:
    async def work():
        world = World(request_timeout_ns=50 * MS)
        sweep = asyncio.create_task(world.operations.requests.sweep())
        world.metadata.stalls = 2
        for _ in range(2):
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await world.operations.getattr(ROOT, CALLER)
            assert caught.value.errno == errno.ETIMEDOUT
        await world.operations.getattr(ROOT, CALLER)
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()
        assert world.operations.metrics.timeouts == 2
        assert not world.operations.requests.running
        sweep.cancel()

    run(work())


@pytest.mark.parametrize("code", [Code.TIMEOUT, Code.EXISTS])
def test_names_are_asked_for_anew_after_a_request_that_may_have_had_effect(
    code, monkeypatch
) -> None:
    """Told that there is no such name, then a mkdir that timed out: the directory may be there."""
    dropped = []
    monkeypatch.setattr(
        pyfuse3, "invalidate_entry_async", lambda parent, name, **_: dropped.append((parent, name))
    )

    async def work():
        world = World()
        world.operations.cache.is_current = lambda: True
        entry = await world.operations.lookup(ROOT, b"d", CALLER)
        assert entry.st_ino == 0
        world.metadata.faults["mknod"] = EmberfsError(code, "told")
        with pytest.raises(pyfuse3.FUSEError):
            await world.operations.mkdir(ROOT, b"d", 0o755, CALLER)
        assert dropped == ([(ROOT, b"d")] if code == Code.TIMEOUT else [])

    run(work())


def test_cancellation_from_outside_stays_a_cancellation() -> None:
    async def work():
        world = World()
        world.metadata.stalls = 1
        task = asyncio.create_task(world.operations.getattr(ROOT, CALLER))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work())


def test_unknown_handle_is_ebadf() -> None:
    async def work():
        operations = World().operations
        for attempt in (operations.read(99, 0, 10), operations.fsync(99, False)):
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await attempt
            assert caught.value.errno == errno.EBADF
        await operations.release(99)

    run(work())


# ---------------------------------------------------------------- open files


def test_open_flags_reach_the_file() -> None:
    async def work():
        world = World()
        _, inode = await world.create()
        seen = {}
        for flags in (0, os.O_DIRECT, os.O_APPEND, os.O_SYNC, os.O_DSYNC):
            info = await world.operations.open(inode, os.O_RDWR | flags, CALLER)
            world.files.writes.clear()
            world.metadata.calls.clear()
            end = len(world.metadata.node(inode).data)
            await world.operations.write(info.fh, end, b"x")
            seen[flags] = (info.direct_io, *world.files.writes[0], world.metadata.calls[-1])
        assert seen == {
            0: (False, False, False, "write"),
            os.O_DIRECT: (True, True, False, "write"),
            os.O_APPEND: (True, False, True, "write"),
            os.O_SYNC: (False, True, False, "fsync"),
            os.O_DSYNC: (False, True, False, "fdatasync"),
        }

    run(work())


def test_page_written_back_through_an_appender_is_no_append() -> None:
    async def work():
        world = World()
        _, inode = await world.create(content=b"0123456789")
        await world.operations.getattr(inode, CALLER)
        appender = await world.operations.open(inode, os.O_WRONLY | os.O_APPEND, CALLER)
        world.files.writes.clear()
        await world.operations.write(appender.fh, 4, b"page")  # a mapping exists: O_RDWR above
        await world.operations.write(appender.fh, 10, b"tail")
        assert [append for _, append in world.files.writes] == [False, True]

    run(work())


def test_append_at_a_stale_offset_is_an_append() -> None:
    """Another client has appended; the kernel does not know yet."""

    async def work():
        world = World()
        info, inode = await world.create(flags=os.O_WRONLY | os.O_APPEND)
        world.metadata.node(inode).data.extend(b"from another client")
        await world.operations.getattr(inode, CALLER)
        await world.operations.write(info.fh, 0, b"!")
        assert bytes(world.metadata.node(inode).data) == b"from another client!"

    run(work())


def test_pages_are_kept_only_while_the_file_is_unchanged() -> None:
    async def work():
        world = World()
        info, inode = await world.create(content=b"abc")
        await world.operations.release(info.fh)

        async def kept(flags=os.O_RDONLY):
            info = await world.operations.open(inode, flags, CALLER)
            await world.operations.release(info.fh)
            return bool(info.keep_cache)

        assert [await kept(), await kept(), await kept()] == [False, True, True]
        node = world.metadata.node(inode)
        node.times[1] += 1  # another client wrote
        assert [await kept(), await kept()] == [False, True]
        node.data.extend(b"d")
        assert [await kept(), await kept()] == [False, True]
        assert not await kept(os.O_WRONLY | os.O_TRUNC)

    run(work())


def test_own_write_does_not_keep_old_pages() -> None:
    async def work():
        world = World()
        info, inode = await world.create(content=b"abc")
        reader = await world.operations.open(inode, os.O_RDONLY, CALLER)
        await world.operations.write(info.fh, 0, b"x")
        again = await world.operations.open(inode, os.O_RDONLY, CALLER)
        assert not again.keep_cache
        await world.operations.release(reader.fh)

    run(work())


def test_open_refreshes_a_length_that_the_kernel_has_wrong(dropped) -> None:
    async def work():
        world = World()
        _, inode = await world.create(content=b"abc")
        await world.operations.getattr(inode, CALLER)
        await world.operations.open(inode, os.O_RDONLY, CALLER)
        assert dropped == []
        world.metadata.node(inode).data.extend(b"more")
        await world.operations.open(inode, os.O_RDONLY, CALLER)
        assert dropped == [inode]

    run(work())


def test_write_by_a_user_takes_suid_away_once() -> None:
    async def work():
        world = World()
        _, inode = await world.create()
        node = world.metadata.node(inode)
        for before, after in ((0o6755, 0o755), (0o2644, 0o2644), (0o4644, 0o644)):
            node.mode = stat.S_IFREG | before
            info = await world.operations.open(inode, os.O_WRONLY, USER)
            await world.operations.write(info.fh, 0, b"x")
            assert stat.S_IMODE(node.mode) == after
        node.mode = stat.S_IFREG | 0o6755
        info = await world.operations.open(inode, os.O_WRONLY, CALLER)
        await world.operations.write(info.fh, 0, b"x")
        assert stat.S_IMODE(node.mode) == 0o6755

    run(work())


def test_writeback_takes_end_of_file_from_the_kernel() -> None:
    async def work():
        world = World(writeback=True)
        _, inode = await world.create()
        info = await world.operations.open(inode, os.O_WRONLY | os.O_APPEND, CALLER)
        world.files.writes.clear()
        await world.operations.write(info.fh, 0, b"x")
        assert world.files.writes == [(False, False)]
        assert await world.operations.read(info.fh, 0, 1) == b"x"

    run(work())


def test_file_is_closed_when_released() -> None:
    async def work():
        world = World()
        info, inode = await world.create(content=b"abc")
        await world.operations.flush(info.fh)
        await world.operations.unlink(ROOT, b"f", CALLER)
        assert await world.operations.read(info.fh, 0, 10) == b"abc"
        await world.operations.release(info.fh)
        assert world.metadata.calls[-1] == "close"
        with pytest.raises(EmberfsError):
            world.metadata.node(inode)

    run(work())


# ---------------------------------------------------------------- what is remembered


def test_forget_drops_what_is_remembered() -> None:
    async def work():
        world = World()
        known = world.operations._known
        before = len(known)
        _, inode = await world.create()
        await world.operations.lookup(ROOT, b"f", CALLER)
        assert len(known) == before + 1
        await world.operations.forget([(inode, 1)])
        assert len(known) == before + 1
        await world.operations.forget([(inode, 1), (12345, 7)])
        assert len(known) == before

    run(work())


def test_absent_capability_is_asked_once() -> None:
    async def work():
        world = World()
        _, inode = await world.create()
        world.operations._known.of(inode).no_capability = False  # as if another had made it
        world.metadata.calls.clear()
        for _ in range(3):
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await world.operations.getxattr(inode, b"security.capability", CALLER)
            assert caught.value.errno == errno.ENODATA
        assert world.metadata.calls == ["getxattr"]
        await world.operations.setxattr(inode, b"security.capability", b"v", CALLER)
        assert await world.operations.getxattr(inode, b"security.capability", CALLER) == b"v"

    run(work())


def test_a_new_file_is_known_to_have_no_capability() -> None:
    async def work():
        world = World()
        _, inode = await world.create()
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await world.operations.getxattr(inode, b"security.capability", CALLER)
        assert caught.value.errno == errno.ENODATA
        assert world.metadata.calls == ["create"]
        await world.operations.setxattr(inode, b"security.capability", b"v", CALLER)
        assert await world.operations.getxattr(inode, b"security.capability", CALLER) == b"v"

    run(work())


def test_acls_are_refused() -> None:
    async def work():
        world = World()
        for attempt in (
            world.operations.getxattr(ROOT, b"system.posix_acl_access", CALLER),
            world.operations.setxattr(ROOT, b"system.posix_acl_access", b"", CALLER),
        ):
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await attempt
            assert caught.value.errno == errno.EOPNOTSUPP

    run(work())


def test_supplementary_groups_are_read_once_a_second(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(pyfuse3, "get_sup_groups", lambda pid: asked.append(pid) or {7, 5})
    world = World()
    context = SimpleNamespace(uid=1000, gid=1000, pid=4242, umask=0)
    callers = world.operations._callers
    assert callers.of(context).groups == (5, 7)
    assert callers.of(context).groups == (5, 7)
    assert asked == [4242]
    assert callers.of(CALLER).groups == ()


# ---------------------------------------------------------------- listings


class Token:
    """A reply with room for some entries."""

    def __init__(self, room):
        self.room = room
        self.rows = []

    def reply(self, token, name, entry, cookie):
        assert token is self
        if len(self.rows) >= self.room:
            return False
        self.rows.append((name, cookie))
        return True


@pytest.fixture
def listing(monkeypatch):
    """List a directory in replies of `room` entries, from a cookie."""
    monkeypatch.setattr(fuse_operations.pyfuse3, "readdir_reply", lambda t, *a: t.reply(t, *a))

    async def rows(operations, fh, cookie, room):
        token = Token(room)
        await operations.readdir(fh, cookie, token)
        return token.rows

    return rows


def test_listing_in_small_replies(listing) -> None:
    async def work():
        world = World()
        names = [b"n%04d" % number for number in range(600)]
        for name in names:
            await world.operations.mkdir(ROOT, name, 0o755, CALLER)
        fh = await world.operations.opendir(ROOT, CALLER)
        for room in (1, 3, 170, 5000):
            found, cookie = [], 0
            while page := await listing(world.operations, fh, cookie, room):
                found += page
                cookie = page[-1][1]
            assert [name for name, _ in found] == [b".", b"..", *names]
            assert len({cookie for _, cookie in found}) == len(found)
        await world.operations.releasedir(fh)

    run(work())


def test_old_cookies_survive_inserts_and_removals(listing) -> None:
    async def work():
        world = World()
        for number in range(0, 1000, 2):
            await world.operations.mkdir(ROOT, b"n%04d" % number, 0o755, CALLER)
        fh = await world.operations.opendir(ROOT, CALLER)
        found, cookie = [], 0
        while page := await listing(world.operations, fh, cookie, 100):
            found += page
            cookie = page[-1][1]
        place = dict(found)
        for number in (101, 301, 999):
            await world.operations.mkdir(ROOT, b"n%04d" % number, 0o755, CALLER)
        await world.operations.rmdir(ROOT, b"n0500", CALLER)
        for name, following in ((b"n0498", b"n0502"), (b"n0100", b"n0101"), (b"n0300", b"n0301"),
                                (b"n0500", b"n0502"), (b"n0998", b"n0999")):  # fmt: skip
            page = await listing(world.operations, fh, place[name], 2)
            assert page[0][0] == following
            assert page[0][1] not in (place.get(n) for n in place if n != following)

    run(work())


def test_pages_beyond_the_exact_ones_still_seek(listing, monkeypatch) -> None:
    monkeypatch.setattr("emberfs.client.handles.EXACT_PAGES", 2)
    monkeypatch.setattr(fuse_operations, "PAGE_ROWS", 10)

    async def work():
        world = World()
        for number in range(100):
            await world.operations.mkdir(ROOT, b"n%04d" % number, 0o755, CALLER)
        fh = await world.operations.opendir(ROOT, CALLER)
        found, cookie = [], 0
        while page := await listing(world.operations, fh, cookie, 7):
            found += page
            cookie = page[-1][1]
        names = [name for name, _ in found]
        for index in (5, 17, 60, 99):
            page = await listing(world.operations, fh, found[index][1], 1)
            assert page[0][0] == names[index + 1]

    run(work())


def test_page_of_vanished_rows_is_not_the_end(listing, monkeypatch) -> None:
    monkeypatch.setattr(fuse_operations, "PAGE_ROWS", 4)

    async def work():
        world = World()
        for number in range(12):
            await world.operations.mkdir(ROOT, b"n%02d" % number, 0o755, CALLER)
        real = world.metadata.readdir

        async def readdir(caller, inode, after, limit, *, plus=True):
            answer = await real(caller, inode, after, limit)
            rows = [
                type(row)(row.name, row.id, row.mode, None) if b"n04" <= row.name < b"n08" else row
                for row in answer.rows
            ]
            return type(answer)(rows=tuple(rows), more=answer.more)

        world.metadata.readdir = readdir
        fh = await world.operations.opendir(ROOT, CALLER)
        found, cookie = [], 0
        while page := await listing(world.operations, fh, cookie, 50):
            found += page
            cookie = page[-1][1]
        assert [n for n, _ in found][2:] == [b"n%02d" % i for i in (*range(4), *range(8, 12))]

    run(work())
