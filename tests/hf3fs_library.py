"""The compatibility layer for programs of 3FS, built as `pip install` builds it.

It is not part of emberfs's own installation: tests build it into a temporary directory.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parent.parent / "deploy" / "hf3fs"
LIBRARY = "libhf3fs_api_shared.so"


@cache
def installed() -> Path:
    """A directory for sys.path with the packages in it; once per process."""
    place = Path(tempfile.mkdtemp(prefix="hf3fs-"))
    place.chmod(0o755)  # programs run as other users as well
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    shutil.copytree(SOURCE, place / "source")
    command = "pip install -q --no-deps --no-build-isolation --no-index --target"
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), str(place / "site"), str(place / "source")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(place / "site"))
    return place / "site"


def library() -> Path:
    """The C library."""
    return installed() / "hf3fs_py_usrbio" / "lib" / LIBRARY


def compile_program(source: Path, target: Path, *flags: str, compiler: str = "gcc") -> Path:
    """Compile a program against header and library; returns its path."""
    include = installed() / "hf3fs_py_usrbio" / "include"
    command = [
        compiler, "-Wall", "-Wextra", "-Werror", "-pedantic", *flags, f"-I{include}", str(source),
        "-o", str(target), f"-L{library().parent}", "-lhf3fs_api_shared", "-pthread",
        f"-Wl,-rpath,{library().parent}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return target


@contextmanager
def opened(io: Any, path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    """A file with a registered descriptor."""
    fd = os.open(path, flags, 0o644)
    try:
        io.register_fd(fd)
        yield fd
    finally:
        io.deregister_fd(fd)
        os.close(fd)
