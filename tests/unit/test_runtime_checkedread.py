"""Reads compared with checksums in one compiled call: as its Python twin says."""

import os
import random
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberfs.runtime.checkedread import (
    DIFFERENT,
    DONE,
    FAILED,
    NOT_CACHED,
    read_checked,
    read_checked_twin,
)
from emberfs.runtime.checksum import crc32c_blocks

DATA = random.Random(1).randbytes(1 << 20)
SUMS = {block: crc32c_blocks(DATA, block) for block in (512, 4096, 65536)}


@pytest.fixture(scope="module")
def fd():
    with tempfile.TemporaryFile() as file:
        file.write(DATA)
        file.flush()
        yield file.fileno()


def both(reads):
    """States by both; their sinks must agree where that means something."""
    found = read_checked(reads)
    contents = [bytes(read[5]) for read in reads]
    assert read_checked_twin(reads) == found
    for state, content, read in zip(found, contents, reads, strict=True):
        if state == DONE:
            assert bytes(read[5]) == content
    return list(found)


def read_of(fd, block, first, count, *, cut=0):
    size = block * count - cut
    return (fd, first * block, SUMS[block], 4 * first, block, memoryview(bytearray(size)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(SUMS)), st.integers(0, 40), st.integers(1, 70)),
        max_size=30,
    )
)
def test_every_sink_is_filled(fd, wanted):
    reads = [
        read_of(fd, block, first, count)
        for block, first, count in wanted
        if (first + count) * block <= len(DATA)
    ]
    assert both(reads) == [DONE] * len(reads)
    for _, offset, _, _, _, sink in reads:
        assert sink == DATA[offset : offset + len(sink)]


def test_what_cannot_be_vouched_for(fd, tmp_path):
    block, sums = 4096, SUMS[4096]
    good = read_of(fd, block, 3, 2)
    wrong_place = (fd, 0, sums, 4, block, memoryview(bytearray(block)))
    cut_block = read_of(fd, block, 3, 2, cut=1)  # its last sum covers more
    beyond_sums = (fd, 0, sums[:4], 0, block, memoryview(bytearray(2 * block)))
    no_sums = (fd, 0, b"", 0, block, memoryview(bytearray(1)))
    beyond_end = (fd, len(DATA) - block, sums, 0, block, memoryview(bytearray(2 * block)))
    closed = (9999, 0, sums, 0, block, memoryview(bytearray(block)))
    reads = [good, wrong_place, cut_block, beyond_sums, no_sums, beyond_end, closed, good]
    expected = [DONE, *[DIFFERENT] * 4, NOT_CACHED, FAILED, DONE]
    assert both(reads) == expected


def test_what_is_not_in_memory_is_not_waited_for(tmp_path):
    path = tmp_path / "cold"
    path.write_bytes(DATA)
    cold = os.open(path, os.O_RDWR)
    try:
        os.fsync(cold)
        os.posix_fadvise(cold, 0, 0, os.POSIX_FADV_DONTNEED)
        state = read_checked([read_of(cold, 65536, 8, 1)])[0]
        assert state in (NOT_CACHED, DONE)  # tmpfs keeps everything
    finally:
        os.close(cold)


def test_nonsense_is_refused_and_nothing_is_held(fd):
    sink = bytearray(4096)
    with pytest.raises(ValueError, match="positive"):
        read_checked([read_of(fd, 4096, 0, 1), (fd, 0, b"", 0, 0, memoryview(sink))])
    with pytest.raises((TypeError, BufferError)):
        read_checked([(fd, 0, b"", 0, 4096, memoryview(b"constant"))])
    with pytest.raises(TypeError):
        read_checked([(fd, 0)])
    sink.clear()  # BufferError if it were still exported
    assert read_checked([]) == b""
