"""Which directory `df DIRECTORY` asks about. To be imported before pyfuse3: see _statfs.c."""

import ctypes
import logging
from collections.abc import Callable

from emberfs.proto.ids import InodeId

log = logging.getLogger("emberfs.client.fuse_statfs")


def _load() -> Callable[[], int]:
    try:
        from emberfs.client import _statfs
    except ImportError as problem:  # installed anew without a compiler, or not at all since
        log.warning("df shows the whole file system, never a quota: %s", problem)
        return lambda: 0
    assert _statfs.__file__ is not None
    ctypes.CDLL(_statfs.__file__, mode=ctypes.RTLD_GLOBAL)
    return _statfs.asked_inode


_asked_inode = _load()


def asked_inode() -> InodeId:
    """Return the inode of the statfs request being answered, 0 if that is not known.

    Right only until the handler waits for something: the next request may come then.
    """
    return InodeId(_asked_inode())
