"""The plain reads of a batch: the compiled loop does what its Python twin does."""

import os
import random
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberfs.fabric.frame import pack_descriptors
from emberfs.fabric.sinks import SinkTable
from emberfs.proto.ids import ChunkId, InodeId, TargetId, pack_chunk_id
from emberfs.proto.storage_calls import ReadOp, pack_read_ops, unpack_read_results
from emberfs.runtime.checksum import crc32c_blocks, crc32c_blocks_twin
from emberfs.storage.plainread import (
    DIFFERENT,
    DISPUTED,
    DONE,
    FAILED,
    NOT_CACHED,
    NOT_PLAIN,
    REFUSED,
    PlainReads,
    Readable,
    read_plainly,
    read_plainly_twin,
)
from emberfs.storage.records import grain_of

MiB = 1 << 20
DATA = random.Random(1).randbytes(4 * MiB)
LENGTHS = (0, 1, 100, 4096, 5000, 65536, 300_000, MiB, 3 * MiB + 7)
CHUNKS = [pack_chunk_id(InodeId(5), i) for i in range(len(LENGTHS) + 5)]
UNKNOWN, ABSENT, ACTIVE, LEFTOVER, ROTTEN = CHUNKS[len(LENGTHS) :]
HERE = (TargetId(101), 7)


class Store:
    """As much of a chunk store as a plain read looks at: chunk i begins at byte 512 * i."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.records: OrderedDict[ChunkId, Any] = OrderedDict({ABSENT: None})
        self.redo: dict[int, None] = {}
        self.active = {ACTIVE: None}
        self.leftover = {LEFTOVER}
        for place, (chunk, length) in enumerate(zip(CHUNKS, LENGTHS, strict=False)):
            self.add(chunk, place, length)
        for chunk in (ACTIVE, LEFTOVER):
            self.add(chunk, 20, 4096)
        self.add(ROTTEN, 21, 4096, checksums=b"rot!")
        self.plain = PlainReads(self, self)  # type: ignore[arg-type]
        self.asked = 0

    def add(self, chunk: ChunkId, block: int, length: int, checksums: bytes | None = None) -> None:
        if checksums is None:
            checksums = crc32c_blocks(DATA[512 * block :][:length], grain_of(length))
        self.records[chunk] = SimpleNamespace(
            block=block, length=length, version=1000 + block, checksums=checksums
        )

    def cached(self, chunk: ChunkId) -> tuple[bool, Any]:
        return chunk in self.records, self.records.get(chunk)

    def descriptor(self, block: int) -> tuple[int, int]:
        return self.fd, 512 * block

    def admit(self, target: int, chain_version: int) -> Readable | None:
        self.asked += 1
        if (target, chain_version) != HERE:
            return None
        return self.plain.readable(self.active, self.leftover)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with tempfile.TemporaryFile() as file:
        file.write(DATA)
        file.flush()
        yield Store(file.fileno())


def both(store: Store, operations: list[ReadOp], cut: int = 0) -> tuple[list[int], list[Any]]:
    """States and results, which the twin must share, and sinks where they mean something."""
    outcomes = []
    for read in (read_plainly, read_plainly_twin):
        sinks = SinkTable.of([memoryview(bytearray(op.length - cut)) for op in operations])
        results, states = read(memoryview(pack_read_ops(operations)), sinks, store.admit)
        views = [bytes(v) for v, s in zip(sinks.views(), states, strict=True) if s == DONE]
        outcomes.append((results, states, views))
    assert outcomes[0] == outcomes[1]
    results, states, views = outcomes[0]
    done = [op for op, state in zip(operations, states, strict=True) if state == DONE]
    for op, view in zip(done, views, strict=True):
        start = 512 * store.records[op.chunk].block + op.offset
        assert view == DATA[start : start + op.length]
    return list(states), unpack_read_results(results)


def read_of(chunk: ChunkId, offset: int = 0, length: int = 4096, here: Any = HERE) -> ReadOp:
    return ReadOp(here[0], here[1], chunk, offset, length)


OFFSETS = st.integers(0, 800).map(lambda n: 4096 * n) | st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 70).map(lambda n: 4096 * n) | st.integers(0, 300_000)
TARGETS = st.sampled_from((HERE,) * 8 + ((101, 6), (102, 7)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.builds(read_of, st.sampled_from(CHUNKS), OFFSETS, SIZES, TARGETS), min_size=1))
def test_any_batch_is_read_as_the_twin_reads_it(store: Store, operations: list[ReadOp]) -> None:
    both(store, operations)


def test_what_is_plain_is_read(store: Store) -> None:
    wanted = [
        read_of(chunk, offset, min(size, length - offset))
        for chunk, length in zip(CHUNKS, LENGTHS, strict=False)
        for offset in range(0, length, 65536)
        for size in (4096, 65536, 4 * MiB)
        if min(size, length - offset) % grain_of(length) == 0 or size > length - offset
    ]
    states, results = both(store, wanted)
    assert set(states) == {DONE}
    assert len(wanted) > 100
    for operation, result in zip(wanted, results, strict=True):
        version = store.records[operation.chunk].version
        assert result == (0, operation.length, version)


def test_what_is_not_plain_says_why(store: Store) -> None:
    large = CHUNKS[7]
    grain = grain_of(MiB)
    cases = {
        read_of(large, here=(102, 7)): REFUSED,
        read_of(large, here=(101, 8)): REFUSED,
        read_of(ACTIVE): DISPUTED,
        read_of(LEFTOVER): DISPUTED,
        read_of(UNKNOWN): NOT_PLAIN,
        read_of(ABSENT): NOT_PLAIN,
        read_of(CHUNKS[0], 0, 1): NOT_PLAIN,
        read_of(large, 1, grain): NOT_PLAIN,
        read_of(large, 0, grain + 1): NOT_PLAIN,
        read_of(large, 0, 0): NOT_PLAIN,
        read_of(large, MiB, grain): NOT_PLAIN,
        read_of(large, 2**32 - grain, grain): NOT_PLAIN,
        read_of(ROTTEN): DIFFERENT,
    }
    states, results = both(store, list(cases))
    assert states == list(cases.values())
    assert set(results) == {(0, 0, 0)}
    assert both(store, [read_of(large, 0, grain)], cut=1)[0] == [REFUSED]


def test_redo_data_over_a_block_is_not_plain(store: Store) -> None:
    store.redo[3] = None
    try:
        assert both(store, [read_of(CHUNKS[3]), read_of(CHUNKS[5])])[0] == [NOT_PLAIN, DONE]
    finally:
        store.redo.clear()


def test_a_new_record_makes_a_new_plan(store: Store) -> None:
    chunk = CHUNKS[4]
    assert both(store, [read_of(chunk)])[1][0].version == 1004
    before = store.records[chunk]
    store.add(chunk, 30, 5000)
    try:
        assert both(store, [read_of(chunk)])[1][0].version == 1030
    finally:
        store.records[chunk] = before
    assert both(store, [read_of(chunk)])[1][0].version == 1004


def test_a_run_of_operations_asks_once_and_touches_what_it_reads(store: Store) -> None:
    store.asked = 0
    store.records.move_to_end(CHUNKS[5])
    reads = [read_of(CHUNKS[3])] * 50 + [read_of(CHUNKS[3], here=(9, 9))] * 50
    read_plainly(
        memoryview(pack_read_ops(reads)),
        SinkTable.of([memoryview(bytearray(4096)) for _ in reads]),
        store.admit,
    )
    assert store.asked == 2
    assert next(reversed(store.records)) == CHUNKS[3]


def test_what_is_not_in_memory_or_fails(tmp_path: Any) -> None:
    path = tmp_path / "cold"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        state = both(Store(fd), [read_of(CHUNKS[7], 524288, 65536)])[0][0]
        assert state in (NOT_CACHED, DONE)  # a memory file system has no cold files
        os.ftruncate(fd, 8192)
        assert both(Store(fd), [read_of(CHUNKS[7], 524288, 65536)])[0] == [NOT_CACHED]
    finally:
        os.close(fd)
    assert both(Store(fd), [read_of(CHUNKS[3])])[0] == [FAILED]


def test_streamed_sinks_follow_each_other(store: Store) -> None:
    streamed = memoryview(bytearray(3 * 4096))
    region = memoryview(bytearray(8192))
    table = SinkTable(
        pack_descriptors([0, 0, 4096, 5, 4096, 4096, 0, 0, 4096]), {5: region}, streamed
    )
    reads = memoryview(pack_read_ops([read_of(CHUNKS[7], 4096 * i) for i in (4, 5, 6)]))
    assert read_plainly(reads, table, store.admit)[1] == bytes(3)
    start = 512 * 7
    assert streamed[:4096] == DATA[start + 4 * 4096 :][:4096]
    assert region[4096:] == DATA[start + 5 * 4096 :][:4096]
    assert streamed[4096:8192] == DATA[start + 6 * 4096 :][:4096]


def test_sinks_outside_of_their_memory_are_refused(store: Store) -> None:
    region = {5: memoryview(bytearray(4096))}
    reads = memoryview(pack_read_ops([read_of(CHUNKS[7])]))
    for sink in ([0, 0, 4096], [6, 0, 4096], [5, 1, 4096], [5, 2**64 - 1, 4096]):
        table = SinkTable(pack_descriptors(sink), region)
        assert read_plainly(reads, table, store.admit)[1] == bytes([REFUSED])


def test_arguments_that_make_no_sense(store: Store) -> None:
    one = memoryview(pack_read_ops([read_of(CHUNKS[3])]))
    for reads, count in ((one, 2), (one[:-1], 1), (one[:0], 0)):
        with pytest.raises(ValueError, match="as many descriptors"):
            read_plainly(reads, SinkTable.of([memoryview(bytearray(4096))] * count), store.admit)
    with pytest.raises(BufferError):
        read_plainly(one, SinkTable.of([memoryview(bytes(4096))]), store.admit)

    def fails(target: int, version: int) -> Readable | None:
        raise struct.error("a bug")

    with pytest.raises(struct.error):
        read_plainly(one, SinkTable.of([memoryview(bytearray(4096))]), fails)


def test_checksums_of_single_blocks_of_every_size() -> None:
    for size in (*range(1, 40), 1023, 1024, 4095, 4096, 4097, 8192, 12288, 16384, 20480, 65536):
        for start in (0, 1, 7):
            part = DATA[start : start + size]
            assert crc32c_blocks(part) == crc32c_blocks_twin(part)
