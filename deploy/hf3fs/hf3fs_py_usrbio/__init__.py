"""Names that programs of 3FS import from its native module, on an emberfs mount.

Failures are OSError with errno: EBADF for a descriptor that is not registered, EACCES
(PermissionError) for one that was not opened for that, EAGAIN (BlockingIOError) for a full ring.
"""

from hf3fs_py_usrbio._buffers import iovec
from hf3fs_py_usrbio._files import (
    deregister_fd,
    extract_mount_point,
    force_fsync,
    hardlink,
    punch_hole,
    register_fd,
)
from hf3fs_py_usrbio._rings import ioring

__all__ = [
    "deregister_fd",
    "extract_mount_point",
    "force_fsync",
    "hardlink",
    "ioring",
    "iovec",
    "punch_hole",
    "register_fd",
]
