"""POSIX cases: open(2) in all its variants, programs being run, lengths, holes, odd calls."""

import errno
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from semantics.posix_tools import KiB, MiB, needs_root, opened, pattern, refused

FS_IOC_GETFLAGS = 0x80086601


def case_open_of_directories(root: Path) -> None:
    (root / "d").mkdir()
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC, os.O_RDONLY | os.O_CREAT):
        with refused(errno.EISDIR):
            os.open(root / "d", flags)
    with refused(errno.EEXIST):
        os.open(root / "d", os.O_RDONLY | os.O_CREAT | os.O_EXCL)
    with opened(root / "d", os.O_RDONLY) as fd, refused(errno.EISDIR):
        os.read(fd, 1)
    with refused(errno.EISDIR):
        os.truncate(root / "d", 0)


def case_open_with_create_follows_links(root: Path) -> None:
    os.symlink("made", root / "link")
    with opened(root / "link", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"through")
    assert (root / "made").read_bytes() == b"through"
    os.symlink("missing/made", root / "broken")
    with refused(errno.ENOENT):
        os.open(root / "broken", os.O_CREAT | os.O_WRONLY)
    with refused(errno.ELOOP):
        os.open(root / "link", os.O_RDONLY | os.O_NOFOLLOW)
    with opened(root / "link", os.O_PATH | os.O_NOFOLLOW) as fd:
        assert os.readlink("", dir_fd=fd) == "made"


def case_truncating_open_cuts_under_readers(root: Path) -> None:
    path = root / "f"
    path.write_bytes(pattern(100_000))
    with opened(path, os.O_RDONLY) as reader:
        assert os.pread(reader, 10, 90_000) == pattern(100_000)[90_000:90_010]
        with opened(path, os.O_WRONLY | os.O_TRUNC):
            assert os.fstat(reader).st_size == 0
            assert os.pread(reader, 10, 0) == b""
    assert path.stat().st_size == 0


def case_mode_of_creation_does_not_bind_its_maker(root: Path) -> None:
    """open(2): the mode applies to later opens only."""
    with opened(root / "f", os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o000) as fd:
        os.write(fd, b"x")
        assert os.pread(fd, 1, 0) == b"x"


def case_truncate_grows_and_cuts_in_turn(root: Path) -> None:
    """What was cut never comes back, whatever the lengths in between."""
    path = root / "f"
    path.write_bytes(pattern(300_000))
    expected = bytearray(pattern(300_000))
    for length in (299_999, 65_536, 65_535, 131_073, 1, 262_144, 0, 100_000):
        os.truncate(path, length)
        del expected[length:]
        expected.extend(bytes(length - len(expected)))
        assert path.stat().st_size == length
        assert path.read_bytes() == bytes(expected)


def case_truncate_of_odd_targets(root: Path) -> None:
    with refused(errno.ENOENT):
        os.truncate(root / "missing", 0)
    (root / "f").write_bytes(b"abc")
    with refused(errno.EFBIG, errno.EINVAL):
        os.truncate(root / "f", (1 << 63) - 1)
    assert (root / "f").read_bytes() == b"abc"
    os.symlink("f", root / "link")
    os.truncate(root / "link", 1)
    assert (root / "f").read_bytes() == b"a"


def case_sparse_file_is_small(root: Path) -> None:
    """st_blocks tells what is stored, not what the length would need."""
    path = root / "f"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, pattern(10_000), 0)
        os.pwrite(fd, b"end", 64 * MiB)
        os.fsync(fd)
        assert os.fstat(fd).st_size == 64 * MiB + 3
        assert 10_003 <= os.fstat(fd).st_blocks * 512 < 32 * MiB
    (root / "grown").write_bytes(pattern(10_000))
    os.truncate(root / "grown", 64 * MiB)
    assert 10_000 <= (root / "grown").stat().st_blocks * 512 < 32 * MiB
    os.truncate(root / "grown", 10_000)
    assert 10_000 <= (root / "grown").stat().st_blocks * 512 < 32 * MiB


def case_data_and_holes_can_be_asked_for(root: Path) -> None:
    """lseek(2): a file system may call everything data; never may it call data a hole."""
    with opened(root / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"start", 0)
        os.pwrite(fd, b"end", 4 * MiB)
        os.fsync(fd)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 4 * MiB, os.SEEK_DATA) == 4 * MiB
        assert os.lseek(fd, 4 * MiB, os.SEEK_HOLE) == 4 * MiB + 3
        assert 5 <= os.lseek(fd, 0, os.SEEK_HOLE) <= 4 * MiB + 3
        with refused(errno.ENXIO):
            os.lseek(fd, 5 * MiB, os.SEEK_DATA)


def case_copy_within_the_kernel(root: Path) -> None:
    (root / "a").write_bytes(pattern(300_000))
    with opened(root / "a", os.O_RDONLY) as one, opened(root / "b", os.O_CREAT | os.O_RDWR) as two:
        done = 0
        while done < 300_000:
            done += os.copy_file_range(one, two, 300_000 - done)
        assert os.sendfile(two, one, 0, 1000) == 1000
    assert (root / "b").read_bytes() == pattern(300_000) + pattern(300_000)[:1000]
    shutil.copy2(root / "a", root / "c")
    assert (root / "c").read_bytes() == pattern(300_000)


@needs_root
def case_running_program_is_not_written(root: Path) -> None:
    """execve(2): ETXTBSY for whoever writes a program or runs what is being written."""
    program = root / "sleep"
    shutil.copy("/bin/sleep", program)
    program.chmod(0o755)
    with opened(program, os.O_WRONLY), refused(errno.ETXTBSY):
        subprocess.run([program, "0"], check=False)
    with subprocess.Popen([program, "30"]) as running:
        try:
            with refused(errno.ETXTBSY):
                os.open(program, os.O_WRONLY)
            with refused(errno.ETXTBSY):
                os.truncate(program, 0)
            program.unlink()  # the name may go
        finally:
            running.kill()


def case_nameless_file_or_a_clear_no(root: Path) -> None:
    try:
        fd = os.open(root, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as problem:
        assert problem.errno == errno.EOPNOTSUPP  # noqa: PT017
        return
    os.write(fd, b"x")
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def case_attributes_by_ioctl_or_a_clear_no(root: Path) -> None:
    (root / "f").write_bytes(b"")
    with opened(root / "f", os.O_RDONLY) as fd:
        try:
            fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))
        except OSError as problem:
            assert problem.errno in (errno.ENOTTY, errno.EOPNOTSUPP)  # noqa: PT017


def case_punching_holes_or_a_clear_no(root: Path) -> None:
    """Without it the file stays as it was."""
    (root / "f").write_bytes(pattern(64 * KiB))
    shell = shutil.which("fallocate")
    if shell is None:
        return
    command = [shell, "--punch-hole", "--offset", "4096", "--length", "4096", root / "f"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = bytearray(pattern(64 * KiB))
    if done.returncode == 0:
        expected[4096:8192] = bytes(4096)
    else:
        assert "supported" in done.stderr
    assert (root / "f").read_bytes() == bytes(expected)
