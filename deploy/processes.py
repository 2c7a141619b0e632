"""Service processes of this host: started detached, found again by pid file, stopped by pid.

A pid file holds the pid and the process's start time, so that a pid that the kernel gave to someone
else is never taken for ours.
"""

import os
import signal
import sys
import time  # this file steers real processes from a command line: no Env, no event loop
from pathlib import Path
from typing import NamedTuple

from emberfs.proto.errors import Code, EmberfsError

POLL_S = 0.02


class Process(NamedTuple):
    """One service of a cluster directory."""

    name: str  # "storage1"
    command: str  # console script, "emberfs-storage"
    config: Path
    pid_file: Path
    log_file: Path


def _start_time(pid: int) -> str | None:
    """Field 22 of /proc/PID/stat (proc(5)); None if there is no such process or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def running_pid(process: Process) -> int | None:
    """Return the pid if this very process is alive."""
    try:
        pid_text, started = process.pid_file.read_text().split()
    except (OSError, ValueError):
        return None
    return int(pid_text) if _start_time(int(pid_text)) == started else None


def start(process: Process) -> int:
    """Start a service detached from this terminal, its output appended to its log."""
    script = Path(sys.executable).absolute().parent / process.command
    if not script.exists():
        raise EmberfsError(Code.CONFIG, f"{script} is missing: install emberfs (make install)")
    with process.log_file.open("ab") as output:
        # env -C: a daemon must not keep a directory busy, least of all one on its own mount.
        pid = os.posix_spawn(
            "/usr/bin/env",
            ["env", "-C", "/", str(script), "--config", str(process.config)],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
            ],
            setsid=True,
        )
    process.pid_file.write_text(f"{pid} {_start_time(pid)}\n")
    return pid


def failure(process: Process) -> str:
    """Explain the death of a service by the last line it wrote."""
    try:
        lines = process.log_file.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    last = lines[-1] if lines else "it wrote nothing"
    return f"{process.name} ended: {last} (log: {process.log_file})"


def stop(process: Process, *, timeout_s: float) -> bool:
    """End a service with SIGTERM, after `timeout_s` with SIGKILL. False if it had to be killed."""
    pid = running_pid(process)
    gentle = True
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        gentle = _wait_end(process, timeout_s)
        if not gentle:
            os.kill(pid, signal.SIGKILL)
            _wait_end(process, 5.0)
    process.pid_file.unlink(missing_ok=True)
    return gentle


def _wait_end(process: Process, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s  # noqa: TID251
    while (pid := running_pid(process)) is not None:
        _reap(pid)
        if time.monotonic() > deadline:  # noqa: TID251
            return False
        time.sleep(POLL_S)
    return True


def _reap(pid: int) -> None:
    """Collect a child of ours that has ended; others are init's."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass


def resident_bytes(pid: int) -> int:
    """Proportional set size: shared pages are counted once over all processes (proc(5))."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0
    )
