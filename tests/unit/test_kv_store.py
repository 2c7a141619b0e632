"""One conformance suite for every OrderedStore, and what is special to each."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emberfs.kv.memory import MemoryStore
from emberfs.kv.rocks import RocksStore
from emberfs.kv.store import OrderedStore
from emberfs.proto.errors import Code, EmberfsError

END = b"\xff" * 8


@pytest.fixture(params=["memory", "rocks"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OrderedStore]:
    made = MemoryStore() if request.param == "memory" else RocksStore(str(tmp_path / "kv"))
    yield made
    made.close()


def test_point_reads(store: OrderedStore) -> None:
    store.write([(b"a", b"1"), (b"b", b""), (b"c", b"3")])
    store.write([(b"c", None)])
    assert store.get(b"a") == b"1"
    assert store.get(b"b") == b""
    assert store.get(b"c") is None
    assert store.get_many([b"c", b"a", b"zz"]) == [None, b"1", None]
    assert store.get_many([]) == []


@pytest.mark.parametrize("through_snapshot", [False, True])
def test_scan_bounds_limit_and_direction(store: OrderedStore, through_snapshot: bool) -> None:
    rows = [(b"k%02d" % i, b"v%d" % i) for i in range(20)]
    store.write(rows)
    view = store.snapshot() if through_snapshot else store
    assert view.scan(b"", END) == rows
    assert view.scan(b"k05", b"k08") == rows[5:8]
    assert view.scan(b"k05", b"k08", reverse=True) == rows[5:8][::-1]
    assert view.scan(b"k", b"l", limit=3) == rows[:3]
    assert view.scan(b"k", b"l", limit=3, reverse=True) == rows[:-4:-1]
    assert view.scan(b"k08", b"k05") == []
    assert view.scan(b"k08", b"k08") == []
    assert view.scan(b"x", b"y") == []


def test_clears_come_before_changes(store: OrderedStore) -> None:
    store.write([(b"a%d" % i, b"old") for i in range(5)])
    store.write([(b"a2", b"new")], [(b"a1", b"a4")])
    assert store.scan(b"a", b"b") == [(b"a0", b"old"), (b"a2", b"new"), (b"a4", b"old")]


def test_snapshot_does_not_move(store: OrderedStore) -> None:
    store.write([(b"a", b"1"), (b"b", b"1"), (b"c", b"1")])
    view = store.snapshot()
    store.write([(b"a", b"2"), (b"b", None), (b"d", b"2")])
    store.write([], [(b"c", b"d")])
    assert view.get_many([b"a", b"b", b"c", b"d"]) == [b"1", b"1", b"1", None]
    assert view.get(b"d") is None
    assert view.scan(b"a", b"z") == [(b"a", b"1"), (b"b", b"1"), (b"c", b"1")]
    assert view.scan(b"a", b"z", limit=2, reverse=True) == [(b"c", b"1"), (b"b", b"1")]
    assert store.scan(b"a", b"z") == [(b"a", b"2"), (b"d", b"2")]


def test_random_walk_against_a_dictionary(store: OrderedStore) -> None:
    dice = random.Random(7)
    model: dict[bytes, bytes] = {}
    views: list[tuple[object, list[tuple[bytes, bytes]]]] = []
    for step in range(300):
        key = b"%03d" % dice.randrange(60)
        if dice.random() < 0.1:
            stop = b"%03d" % dice.randrange(60)
            store.write([], [(key, stop)] if key < stop else [])
            for gone in [k for k in model if key <= k < stop]:
                del model[gone]
        elif dice.random() < 0.3:
            store.write([(key, None)])
            model.pop(key, None)
        else:
            store.write([(key, b"%d" % step)])
            model[key] = b"%d" % step
        if step % 20 == 0:
            views.append((store.snapshot(), sorted(model.items())))
        assert store.scan(b"", END) == sorted(model.items())
    for view, rows in views:
        assert view.scan(b"", END) == rows  # type: ignore[attr-defined]


def test_crash_loses_a_suffix_of_the_unsynced_writes() -> None:
    store = MemoryStore()
    store.write([(b"a", b"1"), (b"gone", b"1")])
    store.sync()
    store.write([(b"a", b"2")])
    store.write([(b"b", b"2")], [(b"gone", b"gonf")])
    assert store.unsynced_count == 2
    store.crash(keep=1)
    assert store.scan(b"", END) == [(b"a", b"2"), (b"gone", b"1")]
    store.write([(b"a", b"3")])
    store.crash()
    assert store.get(b"a") == b"2"


# ---------------------------------------------------------------- RocksDB only


def test_rocks_reopens_with_everything(tmp_path: Path) -> None:
    store = RocksStore(str(tmp_path / "kv"))
    store.write([(b"k%d" % i, b"v" * 100) for i in range(1000)])
    store.close()
    store.close()
    again = RocksStore(str(tmp_path / "kv"))
    assert len(again.scan(b"k", b"l")) == 1000
    again.close()


_DIES = """
import os, sys
from emberfs.kv.rocks import RocksStore
store = RocksStore(sys.argv[1])
for i in range(2000):
    store.write([(b"a%06d" % i, b"1"), (b"b%06d" % i, b"1")])
print(i, flush=True)
os._exit(9)
"""


def test_rocks_keeps_acknowledged_writes_when_the_process_dies(tmp_path: Path) -> None:
    path = str(tmp_path / "kv")
    done = subprocess.run(
        [sys.executable, "-c", _DIES, path], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 9, done.stderr
    store = RocksStore(path)
    assert len(store.scan(b"a", b"b")) == len(store.scan(b"b", b"c")) == int(done.stdout) + 1
    store.close()


def test_r12_rocks_recovers_a_prefix_after_a_torn_log(tmp_path: Path) -> None:
    """A store whose last log record is torn opens with a prefix of what was written.

    Cut the log's tail off, as a power cut may: a prefix of whole batches survives.
    """
    path = tmp_path / "kv"
    done = subprocess.run(
        [sys.executable, "-c", _DIES, str(path)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 9, done.stderr
    log = max(path.glob("*.log"), key=lambda p: p.stat().st_size)
    os.truncate(log, 70_001)  # the log is preallocated; this is in the middle of the batches
    store = RocksStore(str(path))
    left, right = store.scan(b"a", b"b"), store.scan(b"b", b"c")
    assert 0 < len(left) == len(right) < 2000
    assert [key for key, _ in left] == [b"a%06d" % i for i in range(len(left))]
    store.close()


def test_rocks_in_use_is_one_clear_error(tmp_path: Path) -> None:
    path = str(tmp_path / "kv")
    store = RocksStore(path)
    code = f"from emberfs.kv.rocks import RocksStore; RocksStore({path!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False
    )
    assert "EmberfsError" in done.stderr
    assert "another process has it open" in done.stderr
    with pytest.raises(EmberfsError) as raised:
        RocksStore(path)
    assert raised.value.code == Code.CONFIG
    store.close()


def test_rocks_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("x")
    with pytest.raises(EmberfsError) as raised:
        RocksStore(str(tmp_path / "kv"))
    assert raised.value.code == Code.DISK


class _FailingDatabase:
    """Stands for a database on a bad disk."""

    def __init__(self, words: str) -> None:
        self.words = words
        self.syncs = 0

    def flush_wal(self, sync: bool) -> None:
        self.syncs += 1
        raise Exception(self.words)

    def write(self, *_: object) -> None:
        raise Exception(self.words)

    def close(self) -> None:
        pass


def _with_failing_disk(tmp_path: Path, words: str) -> tuple[RocksStore, _FailingDatabase]:
    store = RocksStore(str(tmp_path / "kv"))
    store.close()
    bad = _FailingDatabase(words)
    store._db = bad  # type: ignore[assignment]
    return store, bad


def test_rocks_sync_error_is_final(tmp_path: Path) -> None:
    store, bad = _with_failing_disk(tmp_path, "IO error: While fdatasync: 000004.log: I/O error")
    attempts: list[Callable[[], object]] = [
        store.sync,
        store.sync,
        store.snapshot,
        lambda: store.write([(b"a", b"1")]),
        lambda: store.get(b"a"),
        lambda: store.scan(b"a", b"b"),
    ]
    for attempt in attempts:
        with pytest.raises(EmberfsError, match="sync failed") as raised:
            attempt()
        assert raised.value.code == Code.DISK
    assert bad.syncs == 1


def test_s11_rocks_full_disk_has_its_own_code(tmp_path: Path) -> None:
    """A full disk under the row store is NO_SPACE, and old rows stay."""
    store, _ = _with_failing_disk(
        tmp_path, "IO error: No space left on device: While appending to file: 000004.log"
    )
    with pytest.raises(EmberfsError) as raised:
        store.write([(b"a", b"1")])
    assert raised.value.code == Code.NO_SPACE


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    where = tmp_path / "disk"
    where.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(where)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs: {made.stderr.decode().strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_s11_rocks_full_disk_for_real(small_disk: Path) -> None:
    """A really full file system under the row store is NO_SPACE, and old rows stay.

    Old data stays readable, and with room again the store goes on without a restart.
    """
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(8 << 20))
    store = RocksStore(str(small_disk / "kv"), write_buffer_bytes=1 << 20)
    store.write([(b"old", b"1")])
    store.sync()
    noise, count = random.Random(1).randbytes(4000), 0
    with pytest.raises(EmberfsError) as raised:  # noqa: PT012
        for i in range(4000):
            store.write([(b"k%06d" % i, noise)])
            count = i + 1
    assert raised.value.code == Code.NO_SPACE
    for attempt in (store.sync, lambda: store.write([(b"more", b"1")])):
        with pytest.raises(EmberfsError) as raised:
            attempt()
        assert raised.value.code == Code.NO_SPACE
    assert store.get(b"old") == b"1"
    ballast.unlink()
    store.write([(b"new", b"1")])
    store.sync()
    assert len(store.scan(b"k", b"l")) == count
    assert store.get_many([b"old", b"new", b"more"]) == [b"1", b"1", None]
    store.close()
    with pytest.raises(EmberfsError) as raised:
        store.get(b"old")
    assert raised.value.code == Code.DISK


def test_rocks_sync_releases_the_interpreter(tmp_path: Path) -> None:
    store = RocksStore(str(tmp_path / "kv"))
    store.write([(b"a", b"1")])
    thread = threading.Thread(target=store.sync)
    thread.start()
    thread.join(timeout=5)
    assert not thread.is_alive()
    store.close()


def test_rocks_writes_wait_behind_a_backlog(tmp_path: Path) -> None:
    """A stall of RocksDB is waited out here: left to itself it never ends on a full disk."""
    store = RocksStore(str(tmp_path / "kv"), write_buffer_bytes=1 << 16)
    noise = random.Random(1).randbytes(2000)
    for i in range(6000):
        store.write([(b"k%06d" % (i * 7919 % 6000), noise)])
    assert len(store.scan(b"k", b"l")) == 6000
    store.close()


def test_rocks_reads_no_whole_index_for_a_row(tmp_path: Path) -> None:
    """An index larger than a shard of the cache would be decompressed for every get: see rocks.py.

    RocksDB says what it runs with in a file of its own.
    """
    store = RocksStore(str(tmp_path / "kv"))
    try:
        newest = max((tmp_path / "kv").glob("OPTIONS-*"), key=lambda path: path.stat().st_mtime_ns)
        options = newest.read_text()
    finally:
        store.close()
    assert "index_type=kTwoLevelIndexSearch" in options
    assert "partition_filters=true" in options
    assert "metadata_block_size=4096" in options
