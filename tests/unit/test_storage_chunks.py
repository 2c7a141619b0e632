"""The chunk store on a real disk with its real metadata store."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from emberfs.kv.memory import MemoryStore
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ChunkId, InodeId, KiB, MiB, pack_chunk_id
from emberfs.proto.storage_calls import RememberedWrite, UpdateKind
from emberfs.runtime.real import RealEnv
from emberfs.storage.chunks import ChunkStore
from unit.chunk_faults import FakeEnv, Fuse, World

CHUNK = pack_chunk_id(InodeId(5), 0)
WRITE, TRUNCATE, REMOVE, REPLACE = UpdateKind


def put(
    store: ChunkStore,
    data: bytes,
    *,
    offset: int = 0,
    chunk: ChunkId = CHUNK,
    kind: UpdateKind = WRITE,
    version: int = 0,
    chunk_bytes: int = MiB,
) -> None:
    state = store.state(chunk)
    store.prepare_and_commit(
        chunk, kind, version=version or (state.version if state else 0) + 1, offset=offset,
        length=len(data), data=memoryview(data), chunk_bytes=chunk_bytes, remembered=(),
    )  # fmt: skip


def change(store: ChunkStore, kind: UpdateKind, length: int = 0, chunk: ChunkId = CHUNK) -> None:
    state = store.state(chunk)
    store.prepare_and_commit(
        chunk, kind, version=(state.version if state else 0) + 1, offset=0, length=length,
        data=None, chunk_bytes=MiB, remembered=(),
    )  # fmt: skip


def get(
    store: ChunkStore,
    offset: int = 0,
    length: int = MiB,
    *,
    chunk: ChunkId = CHUNK,
    version: int = 0,
) -> bytes:
    sink = memoryview(bytearray(length))
    found = store.read_into(chunk, version=version, offset=offset, length=length, sink=sink)
    return bytes(sink[: found.length])


def code_of(work: Callable[[], object]) -> Code:
    with pytest.raises(EmberfsError) as caught:
        work()
    assert len(caught.value.message) > 20
    return caught.value.code


@contextmanager
def opened(path: Path, **options: int) -> Iterator[ChunkStore]:
    store = ChunkStore.open(RealEnv(), str(path), **options)
    try:
        yield store
    finally:
        store.close()


class RealWorldEnv:
    """What World needs, on a real directory."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.random, self.fuse = path, random.Random(seed), Fuse()

    def open(self) -> ChunkStore:
        return ChunkStore.open(RealEnv(), str(self.path))


def test_s1_r12_random_life_on_a_real_disk(tmp_path: Path) -> None:
    """A random life with restarts on a real disk equals its model; no block is owned twice."""
    world = World(RealWorldEnv(tmp_path / "t", 1))  # type: ignore[arg-type]
    for _ in range(3):
        world.run(60, flushes=0.03)
        world.compare()
        world.store.close()
        world.store = world.env.open()
        assert not world.store.power_cut_possible
        world.compare()
    world.store.close()


def test_what_a_pending_version_shows(tmp_path: Path) -> None:
    with opened(tmp_path / "t") as store:
        put(store, b"a" * 10000)
        mark = RememberedWrite(1, 2, 3, 2)
        store.prepare(
            CHUNK, WRITE, version=2, offset=5, length=3, data=memoryview(b"xyz"),
            chunk_bytes=MiB, remembered=(mark,),
        )  # fmt: skip
        state = store.state(CHUNK)
        assert state is not None
        assert state.pending is not None
        assert (state.version, state.length, state.remembered) == (1, 10000, ())
        assert (state.pending.version, state.pending.remembered) == (2, (mark,))
        assert store.pending_chunks() == [CHUNK]
        assert get(store, 0, 10) == get(store, 0, 10, version=1) == b"a" * 10
        assert get(store, 0, 10, version=2) == b"aaaaaxyzaa"
        assert code_of(lambda: get(store, version=3)) == Code.VERSION_GAP
        assert code_of(lambda: store.commit(CHUNK, 3)) == Code.VERSION_GAP
        store.commit(CHUNK, 2)
        store.commit(CHUNK, 2)  # a repeated commit is fine
        assert get(store, 4, 5) == b"axyza"
        assert code_of(lambda: get(store, version=1)) == Code.VERSION_GAP
        state = store.state(CHUNK)
        assert state is not None
        assert (state.version, state.remembered, state.pending) == (2, (mark,), None)
        change(store, REMOVE)
        assert store.state(CHUNK) is None
        assert get(store) == b""  # S5
        put(store, b"again")
        state = store.state(CHUNK)
        assert state is not None
        assert state.version == 1


def test_s6_remove_of_a_chunk_that_is_only_pending(tmp_path: Path) -> None:
    """S6: the pending write is superseded and nothing of it stays."""
    with opened(tmp_path / "t") as store:
        store.prepare(
            CHUNK, WRITE, version=1, offset=0, length=3, data=memoryview(b"abc"),
            chunk_bytes=MiB, remembered=(),
        )  # fmt: skip
        state = store.state(CHUNK)
        assert state is not None
        assert (state.version, state.length) == (0, 0)
        change(store, REMOVE)
        assert store.state(CHUNK) is None
        store.flush()
        assert store.used_bytes == 0
        assert store.check().findings == ()


@pytest.mark.parametrize(
    ("version", "offset", "length", "data"),
    [(3, 0, 1, b"x"), (1, 0, 1, b"x"), (2, 0, 2, b"x"), (2, MiB, 1, b"x"), (2, -1, 1, b"x")],
)
def test_impossible_updates_are_refused(
    tmp_path: Path, version: int, offset: int, length: int, data: bytes
) -> None:
    with opened(tmp_path / "t") as store:
        put(store, b"kept")
        code = code_of(
            lambda: store.prepare(
                CHUNK,
                WRITE,
                version=version,
                offset=offset,
                length=length,
                data=memoryview(data),
                chunk_bytes=MiB,
                remembered=(),
            )
        )
        assert code == (Code.INVALID if version == 2 else Code.VERSION_GAP)
        assert get(store) == b"kept"


def flip(path: Path, name: str, offset: int) -> None:
    with open(path / name, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_o14_a_flipped_bit_is_found_and_healed(tmp_path: Path) -> None:
    """A flipped bit is found when it is read, and healed by a replacement."""
    data = random.Random(1).randbytes(MiB)
    with opened(tmp_path / "t") as store:
        put(store, data)
        flip(tmp_path / "t", "blocks.1024K", 300_000)
        assert get(store, 0, 200_000) == data[:200_000]  # no more is verified than is read
        sink = memoryview(bytearray(MiB))
        assert store.try_read_into(CHUNK, version=0, offset=0, length=MiB, sink=sink) is None
        assert not store.damaged
        assert code_of(lambda: get(store, 299_000, 2000)) == Code.CHECKSUM
        assert store.damaged == {CHUNK}
        # Merging would launder the damage into valid checksums.
        assert code_of(lambda: put(store, b"x", offset=300_001)) == Code.CHECKSUM
        assert code_of(lambda: put(store, b"x" * 600_000, offset=400_000)) == Code.CHECKSUM
        rows, _ = store.list(b"", b"", 0)
        assert rows[0].damaged
        put(store, data, kind=REPLACE, version=1)
        assert get(store) == data
        assert not store.damaged


def test_list_with_verify_finds_damage(tmp_path: Path) -> None:
    with opened(tmp_path / "t") as store:
        for index in range(5):
            put(store, bytes([index]) * 70_000, chunk=pack_chunk_id(InodeId(5), index))
        flip(tmp_path / "t", "blocks.128K", 2 * 128 * KiB + 69_999)
        rows, rest = store.list(b"", b"", 0, verify=True)
        assert rest == b""
        assert [row.damaged for row in rows] == [False, False, True, False, False]


def test_list_in_pages_shows_pending_and_agrees_on_digests(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(300_000)
    with opened(tmp_path / "a") as one, opened(tmp_path / "b") as two:
        for index in range(7):
            chunk = pack_chunk_id(InodeId(5), index)
            for at in range(0, 300_000, 100_000):
                put(one, data[at : at + 100_000], offset=at, chunk=chunk)
            put(one, b"small", offset=5000 + index, chunk=chunk)
            put(two, get(one, chunk=chunk), kind=REPLACE, version=4, chunk=chunk)
        lonely = pack_chunk_id(InodeId(5), 3)
        change(one, REMOVE, chunk=lonely)
        one.prepare(
            lonely, WRITE, version=1, offset=0, length=3, data=memoryview(b"abc"),
            chunk_bytes=MiB, remembered=(),
        )  # fmt: skip
        pages, start = [], b""
        while True:
            rows, start = one.list(start, b"", 2)
            pages += rows
            if not start:
                break
        assert [row.chunk for row in pages] == [pack_chunk_id(InodeId(5), n) for n in range(7)]
        assert [row.pending for row in pages] == [0, 0, 0, 1, 0, 0, 0]
        other = {row.chunk: row.digest for row in two.list(b"", b"", 0)[0]}
        assert len(set(other.values())) == 7
        assert all(row.digest == other[row.chunk] for row in pages if row.version)
        stop = pack_chunk_id(InodeId(5), 2)
        assert len(one.list(b"", stop, 0)[0]) == 2


def test_s8_s10_s11_a_small_target_fills_up_and_frees(tmp_path: Path) -> None:
    """A full target says so, keeps its data, and has room again after removals.

    Several classes, a full target, space comes back after removal.
    """
    with opened(tmp_path / "t", capacity_bytes=4 * MiB) as store:
        chunks = [pack_chunk_id(InodeId(9), n) for n in range(4)]
        for chunk in chunks[:3]:
            put(store, b"a" * MiB, chunk=chunk)
        for turn in range(20):  # what an overwrite leaves behind is freed in time
            put(store, bytes([turn]) * MiB, chunk=chunks[0])
        put(store, b"b" * MiB, chunk=chunks[3])
        assert store.used_bytes <= store.capacity_bytes == 4 * MiB
        store.flush()
        assert code_of(lambda: put(store, b"c" * 10)) == Code.NO_SPACE
        assert get(store, chunk=chunks[0]) == bytes([19]) * MiB
        change(store, REMOVE, chunk=chunks[1])
        for index in range(16):
            put(store, b"d" * 60_000, chunk=pack_chunk_id(InodeId(10), index))
        assert store.check().findings == ()
    with opened(tmp_path / "t") as store:
        assert store.capacity_bytes > 4 * MiB


def test_s11_failed_sync_is_final() -> None:
    """After a failed sync nothing is claimed to be stable any more."""
    env = FakeEnv(3)
    store = env.open()
    put(store, b"abc")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    env.disk.files["t/blocks.64K"].datasync = fail  # type: ignore[method-assign]
    assert code_of(store.flush) == Code.DISK
    del env.disk.files["t/blocks.64K"].datasync
    assert code_of(store.flush) == Code.DISK  # the kernel has dropped the pages
    store.close()
    assert b'"clean":false' in env.disk.small["t/format"]


def test_damaged_rows_and_foreign_directories_are_refused(tmp_path: Path) -> None:
    rows = MemoryStore()
    with_store = {"open_store": lambda path: rows}
    env = RealEnv()
    store = ChunkStore.open(env, str(tmp_path), **with_store)  # type: ignore[arg-type]
    put(store, b"abc" * 5000)
    key, value = rows.scan(b"M", b"N")[0]
    taken = code_of(lambda: ChunkStore.open(env, str(tmp_path), **with_store))  # type: ignore[arg-type]
    assert taken == Code.CONFIG
    store.close()
    for seed in range(200):
        dice = random.Random(seed)
        broken = bytearray(value[: dice.choice([len(value), dice.randrange(len(value))])])
        for _ in range(dice.randint(0, 3)):
            if broken:
                broken[dice.randrange(len(broken))] = dice.randrange(256)
        rows.write([(key, bytes(broken))])
        store = ChunkStore.open(env, str(tmp_path), **with_store)  # type: ignore[arg-type]
        try:
            get(store)
        except EmberfsError as problem:
            assert problem.code in (Code.DISK, Code.CHECKSUM)  # noqa: PT017
        store.close()
    (tmp_path / "format").write_bytes(b"something else")
    assert code_of(lambda: ChunkStore.open(env, str(tmp_path))) == Code.CONFIG


def test_a_lost_format_file_loses_no_chunk(tmp_path: Path) -> None:
    with opened(tmp_path / "t") as store:
        put(store, b"abc")
    (tmp_path / "t" / "format").unlink()
    with opened(tmp_path / "t") as store:
        assert store.power_cut_possible
        put(store, b"def", chunk=pack_chunk_id(InodeId(6), 0))
        assert get(store) == b"abc"
        assert store.check().findings == ()


def written_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def test_small_writes_are_not_amplified(tmp_path: Path) -> None:
    """Physical bytes, log and tables of the metadata store included, per logical byte: <= 3."""
    dice = random.Random(4)
    with opened(tmp_path / "t") as store:
        chunks = [pack_chunk_id(InodeId(1), n) for n in range(16)]
        for chunk in chunks:
            put(store, dice.randbytes(MiB), chunk=chunk)
        store.flush()
        page = dice.randbytes(4 * KiB)
        before, count = written_bytes(), 4000
        for number in range(count):
            offset = dice.randrange(256) * 4 * KiB
            put(store, page, offset=offset, chunk=dice.choice(chunks))
            if store.need_flush or number % 500 == 499:
                store.flush()
        store.flush()
        ratio = (written_bytes() - before) / (count * 4 * KiB)
        assert 1.5 < ratio <= 3, ratio


def test_s2_s3_s4_readers_see_whole_versions_while_everything_moves(tmp_path: Path) -> None:
    """Readers see whole versions while chunks are written, moved and removed.

    Readers, a writer and flushes at once; every read is exactly one version.
    """
    dice = random.Random(6)
    contents: dict[int, bytes] = {}
    stopping, problems = threading.Event(), list[BaseException]()

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                while not stopping.is_set():
                    work()
            except BaseException as problem:
                problems.append(problem)
                stopping.set()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    with opened(tmp_path / "t") as store:

        def read() -> None:
            sink = memoryview(bytearray(256 * KiB))
            for way in (store.read_into, store.try_read_into):
                found = way(CHUNK, version=0, offset=0, length=len(sink), sink=sink)
                if found is not None and found.version:
                    assert sink[: found.length] == contents[found.version]

        threads = [guarded(read), guarded(read), guarded(store.flush)]
        content = b""
        for version in range(1, 400):
            size = dice.choice([100, 4096, 20000, 150_000])
            offset = dice.choice([0, len(content), dice.randrange(100_000)])
            data = dice.randbytes(size)
            gap = bytes(max(0, offset - len(content)))
            content = (content + gap)[:offset] + data + content[offset + size :]
            content = content[: 256 * KiB]
            contents[version] = content
            data = data[: len(content) - offset]
            if data:
                put(store, data, offset=offset, chunk_bytes=256 * KiB)
            else:
                change(store, TRUNCATE, len(content))
            if stopping.is_set():
                break
        stopping.set()
        for thread in threads:
            thread.join(20)
        assert not problems, problems
        assert store.check().findings == ()
        assert not store.damaged


KILLED = """
import random, sys
from emberfs.proto.ids import InodeId, pack_chunk_id
from emberfs.proto.storage_calls import UpdateKind
from emberfs.runtime.real import RealEnv
from emberfs.storage.chunks import ChunkStore
store = ChunkStore.open(RealEnv(), sys.argv[1])
dice = random.Random(1)
for number in range(1, 100000):
    chunk = pack_chunk_id(InodeId(3), number % 5)
    state = store.state(chunk)
    data = bytes([number % 251]) * dice.choice([1000, 4096, 60000])
    store.prepare_and_commit(chunk, UpdateKind.WRITE, version=state.version + 1 if state else 1,
        offset=0, length=len(data), data=memoryview(data), chunk_bytes=1 << 20, remembered=())
    print(number, len(data), flush=True)
    if number % 37 == 0:
        store.flush()
"""


def test_r12_o6_kill_nine_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """kill -9 of a process loses nothing that was acknowledged."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "t")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(150)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.stdout.close()
    process.wait()
    acked = [tuple(map(int, line.split())) for line in lines if line.endswith(b"\n")]
    assert len(acked) >= 150
    last = {number % 5: (number, length) for number, length in acked}
    done = acked[-1][0]
    with opened(tmp_path / "t") as store:
        assert not store.power_cut_possible
        assert store.check().findings == ()
        for index, (number, length) in last.items():
            found = get(store, chunk=pack_chunk_id(InodeId(3), index))
            allowed = {number % 251}
            if (done + 1) % 5 == index:  # it may have been under way
                allowed.add((done + 1) % 251)
            assert found[0] in allowed
            if found[0] == number % 251:
                assert found[:length] == bytes([number % 251]) * length
        state = store.state(pack_chunk_id(InodeId(3), done % 5))
        assert state is not None
        assert state.version == (done + 4) // 5
    assert os.listdir(tmp_path / "t")


def test_what_may_run_on_the_event_loop(tmp_path: Path) -> None:
    with opened(tmp_path / "t") as store:
        put(store, bytes(MiB))
        quick = store.is_quick
        assert quick(WRITE, 4096, chunk=CHUNK, offset=8192)
        assert not quick(WRITE, 4096, chunk=CHUNK, offset=8193)
        assert not quick(WRITE, MiB, chunk=CHUNK, offset=0)
        assert quick(REMOVE, 0)
        assert quick(REPLACE, 4096)
        assert not quick(TRUNCATE, 5)
        assert quick(WRITE, 4096)
