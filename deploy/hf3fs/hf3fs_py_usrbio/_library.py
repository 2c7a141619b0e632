"""The C library beside this package, with the types of its functions (include/hf3fs_usrbio.h)."""

import ctypes
import os
from ctypes import c_bool, c_char, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

PATH = Path(__file__).parent / "lib" / "libhf3fs_api_shared.so"
MOUNT_POINT_BYTES = 256


class Iov(ctypes.Structure):
    """`struct hf3fs_iov`."""

    _fields_ = (
        ("base", c_void_p),
        ("iovh", c_void_p),
        ("id", c_char * 16),
        ("mount_point", c_char * MOUNT_POINT_BYTES),
        ("size", c_size_t),
        ("block_size", c_size_t),
        ("numa", c_int),
    )


class Ior(ctypes.Structure):
    """`struct hf3fs_ior`."""

    _fields_ = (
        ("iov", Iov),
        ("iorh", c_void_p),
        ("mount_point", c_char * MOUNT_POINT_BYTES),
        ("for_read", c_bool),
        ("io_depth", c_int),
        ("priority", c_int),
        ("timeout", c_int),
        ("flags", c_uint64),
    )


class Cqe(ctypes.Structure):
    """`struct hf3fs_cqe`."""

    _fields_ = (
        ("index", c_int32),
        ("reserved", c_int32),
        ("result", c_int64),
        ("userdata", c_size_t),  # a number for us, not a pointer
    )


class Timespec(ctypes.Structure):
    """`struct timespec`."""

    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as problem:
        raise ImportError(
            f"{PATH}: {problem}; install emberfs-hf3fs again (make hf3fs), it needs gcc"
        ) from problem
    mount_point, size, flags = c_char_p, c_size_t, c_uint64
    signatures: dict[str, tuple[type | None, tuple[object, ...]]] = {
        "extract_mount_point": (c_int, (c_char_p, c_int, c_char_p)),
        "iovwrap": (c_int, (c_void_p, c_void_p, c_char_p, mount_point, size, size, c_int)),
        "ior_size": (c_size_t, (c_int,)),
        "iorcreate4": (c_int, (c_void_p, mount_point, c_int, c_bool, c_int, c_int, c_int, flags)),
        "iordestroy": (None, (c_void_p,)),
        "reg_fd": (c_int, (c_int, flags)),
        "dereg_fd": (None, (c_int,)),
        "prep_io": (
            c_int,
            (c_void_p, c_void_p, c_bool, c_void_p, c_int, c_size_t, c_uint64, c_size_t),
        ),
        "submit_ios": (c_int, (c_void_p,)),
        "wait_for_ios": (c_int, (c_void_p, c_void_p, c_int, c_int, c_void_p)),
        "hardlink": (c_int, (c_char_p, c_char_p)),
        "punchhole": (c_int, (c_int, c_int, c_void_p, c_void_p, c_size_t)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"hf3fs_{name}")
        function.restype, function.argtypes = result, arguments
    return library


lib = _load()


def error(number: int) -> OSError:
    """The exception of an errno; Python chooses the subclass, EAGAIN is BlockingIOError."""
    return OSError(number, os.strerror(number))


def check(status: int) -> int:
    """Return a status of 0 or more; raise OSError for -errno."""
    if status < 0:
        raise error(-status)
    return status
