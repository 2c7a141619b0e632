"""What the kernel says of a mount point."""

import errno
import os
from pathlib import Path

_ESCAPES = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}


def mount_type(path: Path) -> str | None:
    """Return the file system type mounted exactly at `path`, None if nothing is (proc(5))."""
    found = None
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        place = fields[1]
        for escape, character in _ESCAPES.items():
            place = place.replace(escape, character)
        if place == str(path):
            found = fields[2]
    return found


def is_ember_mount(path: Path) -> bool:
    """Tell whether emberfs is mounted there, alive or stale."""
    return (mount_type(path) or "").startswith("fuse.emberfs") or (
        (mount_type(path) or "").startswith("fuse") and is_stale(path)
    )


def is_stale(path: Path) -> bool:
    """Tell a mount whose daemon is dead: every access says ENOTCONN."""
    try:
        os.statvfs(path)
    except OSError as problem:
        return problem.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False
