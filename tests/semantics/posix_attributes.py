"""POSIX cases: attributes, owners, permissions."""

import ctypes
import errno
import os
import stat
from pathlib import Path

from semantics.posix_tools import as_user, needs_root, opened, pattern, refused


def case_mode_and_umask(root: Path) -> None:
    old = os.umask(0o027)
    try:
        with opened(root / "f", os.O_WRONLY | os.O_CREAT, 0o666):
            pass
        (root / "d").mkdir(mode=0o777)
    finally:
        os.umask(old)
    assert stat.S_IMODE((root / "f").stat().st_mode) == 0o640
    assert stat.S_IMODE((root / "d").stat().st_mode) & 0o777 == 0o750
    for mode in (0o000, 0o644, 0o4755, 0o1777, 0o2711):
        os.chmod(root / "d", mode)
        assert stat.S_IMODE((root / "d").stat().st_mode) == mode


def case_fchmod_and_futimens(root: Path) -> None:
    with opened(root / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.fchmod(fd, 0o600)
        os.utime(fd, ns=(1_000_000_007, 2_000_000_009))
        found = os.fstat(fd)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_007, 2_000_000_009)


def case_utimes_survive_close_after_write(root: Path) -> None:
    """cp -a and tar: write, set the times, close."""
    with opened(root / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"x" * 10_000)
        os.utime(fd, ns=(1_500_000_000_123_456_789, 1_400_000_000_987_654_321))
    assert (root / "f").stat().st_mtime_ns == 1_400_000_000_987_654_321


def case_utime_of_symlink_and_now(root: Path) -> None:
    (root / "f").write_bytes(b"")
    os.symlink("f", root / "link")
    os.utime(root / "link", ns=(5, 6), follow_symlinks=False)
    assert os.lstat(root / "link").st_mtime_ns == 6
    assert (root / "f").stat().st_mtime_ns != 6
    os.utime(root / "f", ns=(5, 6))
    os.utime(root / "f")
    assert (root / "f").stat().st_mtime > 1_000_000_000


def case_times_move_with_changes(root: Path) -> None:
    path = root / "f"
    path.write_bytes(b"1")
    os.utime(path, ns=(1000, 1000))
    os.utime(root, ns=(1000, 1000))
    before = path.stat().st_ctime_ns
    with opened(path, os.O_WRONLY) as fd:
        os.write(fd, b"2")
    assert path.stat().st_mtime_ns > 1000
    assert path.stat().st_ctime_ns >= before
    (root / "g").write_bytes(b"")
    assert root.stat().st_mtime_ns > 1000
    os.utime(path, ns=(1000, 1000))
    path.chmod(0o600)
    assert path.stat().st_mtime_ns == 1000


def case_fstat_follows_writes(root: Path) -> None:
    with opened(root / "f", os.O_WRONLY | os.O_CREAT) as fd:
        for index in range(1, 30):
            os.write(fd, b"x" * 1000)
            assert os.fstat(fd).st_size == index * 1000
            assert (root / "f").stat().st_size == index * 1000


def case_blocks_and_sizes(root: Path) -> None:
    (root / "f").write_bytes(b"x" * 100_000)
    found = (root / "f").stat()
    assert found.st_blocks * 512 >= 100_000
    assert found.st_blksize >= 512


def case_statvfs(root: Path) -> None:
    found = os.statvfs(root)
    assert found.f_namemax >= 255
    assert 0 < found.f_bavail <= found.f_blocks
    assert found.f_frsize >= 512


def case_extended_attributes(root: Path) -> None:
    path = root / "f"
    path.write_bytes(b"")
    try:
        os.setxattr(path, "user.one", b"1")
    except OSError as problem:  # tmpfs before Linux 6.6 has no user attributes
        assert problem.errno == errno.EOPNOTSUPP  # noqa: PT017
        return
    os.setxattr(path, "user.empty", b"")
    os.setxattr(path, "user.big", pattern(3000))
    assert os.getxattr(path, "user.one") == b"1"
    assert os.getxattr(path, "user.empty") == b""
    assert os.getxattr(path, "user.big") == pattern(3000)
    mine = [name for name in os.listxattr(path) if name.startswith("user.")]
    assert sorted(mine) == ["user.big", "user.empty", "user.one"]
    with refused(errno.EEXIST):
        os.setxattr(path, "user.one", b"2", os.XATTR_CREATE)
    with refused(errno.ENODATA):
        os.setxattr(path, "user.new", b"2", os.XATTR_REPLACE)
    os.setxattr(path, "user.one", b"2", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.one") == b"2"
    os.removexattr(path, "user.one")
    with refused(errno.ENODATA):
        os.getxattr(path, "user.one")
    with refused(errno.ENODATA):
        os.removexattr(path, "user.one")
    _small_buffer(path)


def _small_buffer(path: Path) -> None:
    """getxattr(2): size 0 asks how large, too small a buffer is ERANGE."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.getxattr(bytes(path), b"user.big", None, 0) == 3000
    room = ctypes.create_string_buffer(10)
    assert libc.getxattr(bytes(path), b"user.big", room, 10) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert libc.listxattr(bytes(path), room, 2) == -1
    assert ctypes.get_errno() == errno.ERANGE


@needs_root
def case_chown(root: Path) -> None:
    path = root / "f"
    path.write_bytes(b"")
    os.chown(path, 1234, 5678)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 5678)
    os.chown(path, -1, 9)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 9)
    os.symlink("f", root / "link")
    os.lchown(root / "link", 77, 88)
    assert os.lstat(root / "link").st_uid == 77
    assert path.stat().st_uid == 1234


@needs_root
def case_owner_of_what_a_user_makes(root: Path) -> None:
    root.chmod(0o777)
    as_user(1234, 5678, [], "open(argv[1], 'w').close(); os.mkdir(argv[2])",
            root / "f", root / "d")  # fmt: skip
    for name in ("f", "d"):
        found = (root / name).stat()
        assert (found.st_uid, found.st_gid) == (1234, 5678)


@needs_root
def case_permissions_are_enforced(root: Path) -> None:
    root.chmod(0o755)
    (root / "private").write_bytes(b"secret")
    (root / "private").chmod(0o600)
    (root / "closed").mkdir(mode=0o700)
    script = """
for attempt in (lambda: open(argv[1]), lambda: open(argv[1] + '.new', 'w'),
                lambda: os.unlink(argv[1]), lambda: os.listdir(argv[2]),
                lambda: os.truncate(argv[1], 0), lambda: os.chmod(argv[1], 0o777)):
    try:
        attempt()
        print('allowed')
    except PermissionError:
        print('refused')
"""
    answers = as_user(1234, 5678, [], script, root / "private", root / "closed")
    assert answers.split() == ["refused"] * 6


@needs_root
def case_supplementary_groups(root: Path) -> None:
    path = root / "shared"
    path.write_bytes(b"for the group")
    os.chown(path, 0, 4321)
    path.chmod(0o640)
    root.chmod(0o755)
    script = "print(open(argv[1]).read())"
    assert as_user(1234, 5678, [4321], script, path) == "for the group"
    os.chown(root, 0, 4321)
    root.chmod(0o770)
    as_user(1234, 5678, [4321], "os.mkdir(argv[1]); os.rmdir(argv[1])", root / "d")


@needs_root
def case_set_group_directory(root: Path) -> None:
    (root / "d").mkdir()
    os.chown(root / "d", 0, 4321)
    (root / "d").chmod(0o2777)
    as_user(1234, 5678, [], "open(argv[1], 'w').close(); os.mkdir(argv[2])",
            root / "d" / "f", root / "d" / "e")  # fmt: skip
    assert (root / "d" / "f").stat().st_gid == 4321
    assert (root / "d" / "e").stat().st_gid == 4321
    assert (root / "d" / "e").stat().st_mode & stat.S_ISGID


@needs_root
def case_sticky_directory(root: Path) -> None:
    root.chmod(0o1777)
    (root / "f").write_bytes(b"")
    script = """
for attempt in (lambda: os.unlink(argv[1]), lambda: os.rename(argv[1], argv[1] + 'x')):
    try:
        attempt()
        print('allowed')
    except PermissionError:
        print('refused')
"""
    assert as_user(1234, 5678, [], script, root / "f").split() == ["refused"] * 2
    assert (root / "f").exists()


@needs_root
def case_write_takes_suid_away(root: Path) -> None:
    root.chmod(0o755)
    path = root / "f"
    path.write_bytes(b"program")
    os.chown(path, 1234, 5678)
    path.chmod(0o6755)
    as_user(1234, 5678, [], "f = open(argv[1], 'r+b', 0); f.write(b'X'); f.close()", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@needs_root
def case_open_checks_once(root: Path) -> None:
    """A descriptor outlives the permission that opened it."""
    path = root / "f"
    root.chmod(0o777)
    script = """
fd = os.open(argv[1], os.O_RDWR | os.O_CREAT, 0o400)
os.write(fd, b'one')
os.fchmod(fd, 0)
os.write(fd, b'two')
print(os.pread(fd, 10, 0).decode())
"""
    assert as_user(1234, 5678, [], script, path) == "onetwo"
