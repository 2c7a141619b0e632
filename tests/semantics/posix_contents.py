"""POSIX cases: what files contain."""

import errno
import fcntl
import mmap
import os
from pathlib import Path

from semantics.posix_tools import KiB, MiB, opened, pattern, refused


def case_write_then_read(root: Path) -> None:
    for length in (0, 1, 4095, 4096, 4097, 65_537, 1 * MiB, 3 * MiB + 5):
        path = root / f"f{length}"
        path.write_bytes(pattern(length))
        assert path.read_bytes() == pattern(length)
        assert path.stat().st_size == length


def case_positional_writes(root: Path) -> None:
    expected = bytearray(300_000)
    with opened(root / "f", os.O_RDWR | os.O_CREAT) as fd:
        for offset, length in ((250_000, 50_000), (0, 5), (4090, 20), (65_530, 70_000), (99, 1)):
            data = pattern(length, offset)
            assert os.pwrite(fd, data, offset) == length
            expected[offset : offset + length] = data
            assert os.pread(fd, 400_000, 0) == bytes(expected)
    assert (root / "f").read_bytes() == bytes(expected)


def case_hole_reads_as_zeros(root: Path) -> None:
    with opened(root / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"end", 5 * MiB)
        assert os.fstat(fd).st_size == 5 * MiB + 3
        assert os.pread(fd, 2 * MiB, 1 * MiB) == bytes(2 * MiB)
        assert os.pread(fd, 10, 5 * MiB - 2) == b"\0\0end"


def case_read_at_and_beyond_end(root: Path) -> None:
    (root / "f").write_bytes(b"12345")
    with opened(root / "f", os.O_RDONLY) as fd:
        assert os.pread(fd, 100, 3) == b"45"
        assert os.pread(fd, 100, 5) == b""
        assert os.pread(fd, 100, 1 << 40) == b""


def case_append(root: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with opened(root / "f", flags) as one, opened(root / "f", flags) as two:
        for index in range(20):
            os.write(one if index % 2 else two, b"%04d\n" % index)
    assert (root / "f").read_bytes() == b"".join(b"%04d\n" % index for index in range(20))


def case_append_and_read_through_one_descriptor(root: Path) -> None:
    with opened(root / "f", os.O_RDWR | os.O_CREAT | os.O_APPEND) as fd:
        os.write(fd, b"one")
        assert os.pread(fd, 10, 0) == b"one"
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"two")
        assert os.pread(fd, 10, 0) == b"onetwo"


def case_truncate_open_flag(root: Path) -> None:
    path = root / "f"
    path.write_bytes(pattern(100_000))
    with opened(path, os.O_WRONLY | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
        os.write(fd, b"new")
    assert path.read_bytes() == b"new"


def case_truncate_down_and_up(root: Path) -> None:
    path = root / "f"
    path.write_bytes(pattern(200_000))
    os.truncate(path, 70_001)
    assert path.read_bytes() == pattern(200_000)[:70_001]
    os.truncate(path, 150_000)
    assert path.read_bytes() == pattern(200_000)[:70_001] + bytes(79_999)
    with refused(errno.EINVAL):
        os.truncate(path, -1)


def case_ftruncate_of_written_file(root: Path) -> None:
    with opened(root / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, pattern(100_000))
        os.ftruncate(fd, 10)
        assert os.fstat(fd).st_size == 10
        os.pwrite(fd, b"x", 20)
        assert os.pread(fd, 100, 0) == pattern(10) + bytes(10) + b"x"


def case_ftruncate_needs_write_access(root: Path) -> None:
    (root / "f").write_bytes(b"abc")
    with opened(root / "f", os.O_RDONLY) as fd, refused(errno.EINVAL, errno.EBADF):
        os.ftruncate(fd, 0)


def case_two_descriptors_see_each_other(root: Path) -> None:
    flags = os.O_RDWR | os.O_CREAT
    with opened(root / "f", flags) as one, opened(root / "f", flags) as two:
        os.pwrite(one, b"hello", 0)
        assert os.pread(two, 10, 0) == b"hello"
        assert os.fstat(two).st_size == 5
        os.pwrite(two, b"J", 0)
        assert os.pread(one, 10, 0) == b"Jello"


def case_direct_io(root: Path) -> None:
    """O_DIRECT with aligned buffers, mixed with buffered descriptors of the same file."""
    if not hasattr(os, "O_DIRECT"):
        return
    path = root / "f"
    path.write_bytes(pattern(64 * KiB))
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as problem:  # tmpfs before Linux 6.6
        assert problem.errno == errno.EINVAL  # noqa: PT017
        return
    memory = mmap.mmap(-1, 64 * KiB)
    try:
        with opened(path, os.O_RDWR) as buffered:
            assert os.preadv(fd, [memory], 0) == 64 * KiB
            assert memory[:] == pattern(64 * KiB)
            memory[:8192] = pattern(8192, 7)
            assert os.pread(buffered, 10, 0) == pattern(10)  # now in the page cache
            assert os.pwritev(fd, [memoryview(memory)[:8192]], 4096) == 8192
            assert os.pread(buffered, 8192, 4096) == pattern(8192, 7)
            os.pwrite(buffered, b"buffered", 0)
            assert os.preadv(fd, [memory], 0) == 64 * KiB
            assert memory[:8] == b"buffered"
    finally:
        os.close(fd)


def case_synchronous_writes(root: Path) -> None:
    for name, flag in (("sync", os.O_SYNC), ("dsync", os.O_DSYNC)):
        with opened(root / name, os.O_RDWR | os.O_CREAT | flag) as fd:
            for index in range(5):
                os.write(fd, b"%d" % index)
            assert os.pread(fd, 10, 0) == b"01234"


def case_fsync(root: Path) -> None:
    with opened(root / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"x" * 5000)
        os.fsync(fd)
        os.fdatasync(fd)
    with opened(root / "f", os.O_RDONLY) as fd:
        os.fsync(fd)
    with opened(root, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def case_shared_mapping(root: Path) -> None:
    path = root / "f"
    path.write_bytes(pattern(100_000))
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 100_000) as memory:
        assert memory[:] == pattern(100_000)
        memory[50_000:50_005] = b"HELLO"
        memory.flush()
        assert os.pread(fd, 5, 50_000) == b"HELLO"
        os.pwrite(fd, b"world", 10)
        assert memory[10:15] == b"world"
    expected = bytearray(pattern(100_000))
    expected[50_000:50_005], expected[10:15] = b"HELLO", b"world"
    assert path.read_bytes() == bytes(expected)


def case_mapping_beside_an_appender(root: Path) -> None:
    """Pages written back must land where they belong, whoever else has the file open."""
    path = root / "f"
    path.write_bytes(pattern(20_000))
    with (
        opened(path, os.O_RDWR) as fd,
        opened(path, os.O_WRONLY | os.O_APPEND) as appender,
        mmap.mmap(fd, 20_000) as memory,
    ):
        os.write(appender, b"tail")
        memory[5000:5004] = b"page"
        memory.flush()
        os.write(appender, b"more")
    expected = bytearray(pattern(20_000)) + b"tailmore"
    expected[5000:5004] = b"page"
    assert path.read_bytes() == bytes(expected)


def case_private_mapping(root: Path) -> None:
    (root / "f").write_bytes(b"a" * 5000)
    with (
        opened(root / "f", os.O_RDONLY) as fd,
        mmap.mmap(fd, 5000, flags=mmap.MAP_PRIVATE) as memory,
    ):
        memory[0:1] = b"b"
        assert memory[:2] == b"ba"
    assert (root / "f").read_bytes() == b"a" * 5000


def case_unlinked_file_stays_usable(root: Path) -> None:
    path = root / "f"
    path.write_bytes(pattern(50_000))
    with opened(path, os.O_RDWR) as fd, opened(path, os.O_RDONLY) as reader:
        path.unlink()
        with refused(errno.ENOENT):
            path.stat()
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(reader, 60_000, 0) == pattern(50_000)
        os.pwrite(fd, b"still", 49_998)
        assert os.fstat(fd).st_size == 50_003
        assert os.pread(reader, 10, 49_998) == b"still"
        os.ftruncate(fd, 3)
        assert os.fstat(reader).st_size == 3
        path.write_bytes(b"another")
        assert os.pread(fd, 10, 0) == pattern(3)
    assert path.read_bytes() == b"another"


def case_replaced_file_stays_usable(root: Path) -> None:
    (root / "old").write_bytes(b"old")
    (root / "new").write_bytes(b"new")
    with opened(root / "old", os.O_RDONLY) as fd:
        os.rename(root / "new", root / "old")
        assert os.read(fd, 10) == b"old"
    assert (root / "old").read_bytes() == b"new"


def case_access_mode_of_descriptor(root: Path) -> None:
    (root / "f").write_bytes(b"abc")
    with opened(root / "f", os.O_RDONLY) as fd, refused(errno.EBADF):
        os.write(fd, b"x")
    with opened(root / "f", os.O_WRONLY) as fd, refused(errno.EBADF):
        os.read(fd, 1)


def case_fallocate_or_a_clear_no(root: Path) -> None:
    with opened(root / "f", os.O_RDWR | os.O_CREAT) as fd:
        try:
            os.posix_fallocate(fd, 0, 10_000)
        except OSError as problem:
            assert problem.errno == errno.EOPNOTSUPP  # noqa: PT017
        else:
            assert os.fstat(fd).st_size == 10_000
            assert os.pread(fd, 10_000, 0) == bytes(10_000)


def case_locks_within_one_mount(root: Path) -> None:
    (root / "f").write_bytes(b"")
    with opened(root / "f", os.O_RDWR) as one, opened(root / "f", os.O_RDWR) as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        with refused(errno.EAGAIN):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
