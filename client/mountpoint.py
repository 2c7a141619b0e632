"""The directory that emberfs is mounted on: checked, cleaned of a dead mount, unmounted, tuned.

A daemon that was killed leaves a mount behind on which every access says ENOTCONN ("Transport
endpoint is not connected"); it is detached before a new mount. See mount(2), proc_pid_mountinfo(5)
and the kernel's Documentation/filesystems/fuse.rst for the files below /sys.
"""

import ctypes
import errno
import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from emberfs.proto.errors import Code, EmberfsError

log = logging.getLogger("emberfs.client.mountpoint")

DEVICE = Path("/dev/fuse")
BACKGROUND_MAX = 128  # asynchronous requests in flight: read-ahead, O_DIRECT with aio
CONGESTION_THRESHOLD = 96
_CONNECTIONS = Path("/sys/fs/fuse/connections")
_MS_NOSUID, _MS_NODEV, _MS_POSIXACL = 2, 4, 1 << 16
_TOOL_TIMEOUT_S = 3
_PROBE_TIMEOUT_S = 5
_ESCAPES = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}
_abandoned: list[subprocess.Popen[bytes]] = []
_DEAD = {errno.ENOTCONN, errno.ECONNABORTED}


class Mount(NamedTuple):
    """One line of the kernel's mount table."""

    path: str
    kind: str  # "fuse.emberfs", "ext4"
    source: str
    device: str  # "major:minor"


def mounts() -> list[Mount]:
    """Everything that is mounted, lowest first (/proc/self/mountinfo)."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, after = line.split(" - ", 1)
        fields, rest = before.split(), after.split()
        found.append(Mount(_unescape(fields[4]), rest[0], _unescape(rest[1]), fields[2]))
    return found


def mount_at(path: str) -> Mount | None:
    """The uppermost mount exactly at `path`, None if there is none."""
    place = _real(path)
    return next((mount for mount in reversed(mounts()) if mount.path == place), None)


def is_ours(path: str) -> bool:
    """Tell whether emberfs is mounted at `path`, its daemon alive or dead."""
    mount = mount_at(path)
    return mount is not None and mount.kind == "fuse.emberfs"


def prepare(path: str) -> str:
    """Make sure that something can be mounted at `path`; return its absolute form.

    A dead FUSE mount is detached. Raises EmberfsError(CONFIG or BUSY) with cause and remedy.
    """
    check_tools()
    place = _real(path)
    while (mount := mount_at(place)) is not None and is_dead(place):
        log.warning("%s: the daemon of this mount is dead; detaching it", place)
        _detach(place, mount)
    if mount is not None and mount.kind.startswith("fuse"):
        raise EmberfsError(
            Code.BUSY,
            f"{place}: {mount.source} is mounted here already and answers; "
            f"unmount it first (fusermount3 -u {place}) or choose another mount point",
        )
    _check_directory(place)
    return place


def check_tools() -> None:
    """Refuse to go on without /dev/fuse or fusermount3. Raises EmberfsError(CONFIG)."""
    if not DEVICE.exists():
        raise EmberfsError(
            Code.CONFIG,
            f"{DEVICE} is missing; run modprobe fuse, or start the container with "
            f"--device {DEVICE} --cap-add SYS_ADMIN",
        )
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise EmberfsError(Code.CONFIG, f"{DEVICE}: no permission; chmod 666 {DEVICE} or be root")
    if shutil.which("fusermount3") is None:
        raise EmberfsError(
            Code.CONFIG, "fusermount3 is not installed; run apt-get install fuse3 (or dnf, apk)"
        )


def mount_with_acl(path: str, options: set[str]) -> int:
    """Mount as mount(2) does with MS_POSIXACL and return the device for libfuse; needs root.

    libfuse cannot ask for that flag. It makes the kernel leave the umask to us, which a directory's
    default ACL replaces (acl(5)).
    """
    named = dict(option.partition("=")[::2] for option in options)
    source, kind = named.pop("fsname", "emberfs"), "fuse." + named.pop("subtype", "emberfs")
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    data += "".join(f",{name}={value}" if value else f",{name}" for name, value in named.items())
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _MS_NOSUID | _MS_NODEV | _MS_POSIXACL
    if libc.mount(source.encode(), os.fsencode(path), kind.encode(), flags, data.encode()):
        problem = os.strerror(ctypes.get_errno())
        os.close(device)
        raise EmberfsError(Code.CONFIG, f"{path}: mounting failed: {problem}; see mount(2)")
    return device


def is_dead(path: str) -> bool:
    """Tell a FUSE mount whose daemon is gone.

    A daemon that lives but hangs would hang us as well, so a child asks first. Raises
    EmberfsError(BUSY) when it gets no answer.
    """
    if _finish(("stat", "-f", path), _PROBE_TIMEOUT_S) is None:
        raise EmberfsError(
            Code.BUSY,
            f"{path}: a mount is here whose daemon does not answer; stop that process, or detach "
            f"the mount with umount -l {path}",
        )
    try:
        os.statvfs(path)  # stat(2) may still be answered from the kernel's cache
    except OSError as problem:
        return problem.errno in _DEAD
    return False


def unmount(path: str, *, lazy: bool = False) -> bool:
    """Unmount what is mounted at `path`; False if it is in use (and not `lazy`)."""
    mount = mount_at(path)
    if mount is None:
        return True
    status = _finish(("fusermount3", "-uz" if lazy else "-u", mount.path), _TOOL_TIMEOUT_S)
    if status is None:  # it waits for a daemon that does not answer; so would umount
        return False
    return status == 0 or _run("umount", *(["-l"] if lazy else []), mount.path)


def write_back(path: str) -> bool:
    """Make the kernel send what it holds of mapped and gathered writes (syncfs(2))."""
    return _run("sync", "-f", path)


def tune(path: str, read_ahead_bytes: int) -> None:
    """Raise read-ahead and the count of background requests of a mount; needs root, else no-op.

    pyfuse3 does not expose either in its INIT reply, so they are set through /sys afterwards.
    """
    mount = mount_at(path)
    if mount is None or os.geteuid() != 0:
        return
    _write(Path("/sys/class/bdi") / mount.device / "read_ahead_kb", read_ahead_bytes // 1024)
    connection = _CONNECTIONS / mount.device.split(":")[1]
    borrowed = False
    if not connection.exists():  # containers come without it; systemd mounts it on hosts
        borrowed = _run("mount", "-t", "fusectl", "fusectl", str(_CONNECTIONS))
    _write(connection / "max_background", BACKGROUND_MAX)
    _write(connection / "congestion_threshold", CONGESTION_THRESHOLD)
    if borrowed:  # leave the host as it was
        _run("umount", str(_CONNECTIONS))


def _check_directory(place: str) -> None:
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        raise EmberfsError(
            Code.CONFIG, f"{place}: no such directory; create the mount point (mkdir -p {place})"
        ) from None
    except NotADirectoryError:
        raise EmberfsError(
            Code.CONFIG, f"{place}: not a directory; choose a directory as the mount point"
        ) from None
    except OSError as problem:
        raise EmberfsError(
            Code.CONFIG, f"{place}: {problem.strerror}; choose another mount point"
        ) from None
    if names:
        raise EmberfsError(
            Code.CONFIG,
            f"{place}: not empty ({len(names)} entries, for example {min(names)!r}); mounting "
            "would hide them: empty it or choose another mount point",
        )


def _detach(place: str, mount: Mount) -> None:
    if not unmount(place, lazy=True):
        raise EmberfsError(
            Code.BUSY,
            f"{place}: a dead {mount.kind} mount is here and cannot be detached; "
            f"run umount -l {place} as root",
        )


def _real(path: str) -> str:
    """Absolute and free of symlinks, without touching a mount point itself (it may hang)."""
    parent, name = os.path.split(os.path.abspath(path))
    place = os.path.join(os.path.realpath(parent), name)
    if any(mount.path == place for mount in mounts()):
        return place
    return os.path.realpath(place)


def _unescape(field: str) -> str:
    for escape, character in _ESCAPES.items():
        field = field.replace(escape, character)
    return field


def _run(*command: str) -> bool:
    """Run a tool; False if it is missing, fails or takes too long."""
    return _finish(command, _TOOL_TIMEOUT_S) == 0


def _finish(command: tuple[str, ...], timeout_s: float) -> int | None:
    """Run a tool; its exit status, None if it did not end in time.

    A child whose request a FUSE daemon has taken and never answers cannot even be killed: nobody
    may wait for it.
    """
    _abandoned[:] = [child for child in _abandoned if child.poll() is None]
    quiet = subprocess.DEVNULL
    try:
        child = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    except OSError as problem:
        log.debug("%s: %s", " ".join(command), problem)
        return 127
    try:
        return child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        log.warning("%s: not done after %.1f s", " ".join(command), timeout_s)
        child.kill()
        _abandoned.append(child)
        return None


def _write(path: Path, number: int) -> None:
    try:
        path.write_text(f"{number}\n")
    except OSError as problem:
        log.info("%s stays as it is: %s", path, problem.strerror)
