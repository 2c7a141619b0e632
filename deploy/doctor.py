"""`emberfs doctor`: what this host lacks, each finding with its remedy."""

import importlib.metadata
import os
import resource
import shutil
import socket
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from emberfs.proto.ids import GiB, MiB
from emberfs.runtime.env import Env

NOFILE_MIN = 4096
MEMLOCK_MIN_BYTES = 8 * MiB
FREE_MIN_BYTES = 1 * GiB
WALL_CLOCK_MIN_NS = 1_700_000_000 * 1_000_000_000  # 2023: before that, no clock is set
PACKAGES = ("grpcio", "msgspec", "pyfuse3", "rocksdict", "uvloop", "crc32c", "prometheus-client")


class Grade(IntEnum):
    """How bad a finding is."""

    FINE = 0
    WARNING = 1  # works, but worse or not for long
    FATAL = 2  # `up` cannot work


class Finding(NamedTuple):
    """One thing looked at."""

    grade: Grade
    subject: str
    seen: str
    remedy: str = ""


def examine(env: Env, directory: Path, ports: list[int]) -> list[Finding]:
    """Look at everything that a local cluster needs. `ports` are those not ours already."""
    return [
        *_fuse(),
        *_limits(),
        *(_port(port) for port in ports),
        _space(env, directory),
        _clock(env),
        *_packages(),
    ]


def _fuse() -> Iterator[Finding]:
    device = Path("/dev/fuse")
    if not device.exists():
        yield Finding(
            Grade.FATAL,
            "/dev/fuse",
            "missing",
            "modprobe fuse; in a container start it with --device /dev/fuse --cap-add SYS_ADMIN",
        )
    elif not os.access(device, os.R_OK | os.W_OK):
        yield Finding(Grade.FATAL, "/dev/fuse", "no permission", "chmod 666 /dev/fuse, or be root")
    else:
        yield Finding(Grade.FINE, "/dev/fuse", "usable")
    tool = shutil.which("fusermount3")
    if tool is None:
        yield Finding(Grade.FATAL, "fusermount3", "not installed", "apt-get install fuse3")
    else:
        yield Finding(Grade.FINE, "fusermount3", tool)


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < NOFILE_MIN:
        yield Finding(
            Grade.WARNING,
            "open files",
            f"limit {soft}",
            f"ulimit -n {min(NOFILE_MIN, hard)}, or LimitNOFILE in the systemd unit",
        )
    else:
        yield Finding(Grade.FINE, "open files", f"limit {soft}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // 1024} KiB"
    if soft != resource.RLIM_INFINITY and soft < MEMLOCK_MIN_BYTES:
        yield Finding(
            Grade.WARNING,
            "locked memory",
            locked,
            "only RDMA needs it: LimitMEMLOCK=infinity in the systemd unit",
        )
    else:
        yield Finding(Grade.FINE, "locked memory", locked)


def _port(port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as problem:
            return Finding(
                Grade.FATAL,
                f"port {port}",
                problem.strerror or str(problem),
                "stop the process that uses it (ss -ltnp), or choose another --base-port",
            )
    return Finding(Grade.FINE, f"port {port}", "free")


def _space(env: Env, directory: Path) -> Finding:
    place = directory
    while not place.exists():
        place = place.parent
    free = env.disk.space(str(place)).free_bytes
    seen = f"{free / GiB:.1f} GiB free at {place}"
    if free < FREE_MIN_BYTES:
        return Finding(Grade.WARNING, "space", seen, "free some, or choose another --directory")
    return Finding(Grade.FINE, "space", seen)


def _clock(env: Env) -> Finding:
    if env.wall_ns() < WALL_CLOCK_MIN_NS:
        return Finding(
            Grade.WARNING,
            "clock",
            "is years behind: file times will be wrong",
            "start a time service (apt-get install chrony)",
        )
    return Finding(Grade.FINE, "clock", "plausible")


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(Grade.FINE, name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(Grade.FATAL, name, "not installed", "make install")
