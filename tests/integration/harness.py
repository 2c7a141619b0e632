"""A real cluster on this host for a test: real processes, real sockets, a real mount.

Everything lives in one short temporary directory (Unix socket paths are limited) and is ended by
pid and unmounted also when the test fails.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emberfs.client.mountpoint import is_ours
from emberfs.deploy import processes
from emberfs.deploy.plan import Plan, load_plan

BIN = Path(sys.executable).parent
COMMAND_TIMEOUT_S = 90
WORKERS = 4  # of pytest-xdist, at most, that have ports of their own


def run(
    *command: object,
    cwd: Path | None = None,
    timeout_s: float = COMMAND_TIMEOUT_S,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; on failure the assertion shows what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def free_port_block(count: int) -> int:
    """Return the first of `count` neighbouring ports that are free now, off the ephemeral range.

    Workers of pytest-xdist, which look at the same time, do not look at the same ports.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    first = 21000 + os.getpid() % 100 * WORKERS * 20
    for base in range(first + worker * 20, 32000, WORKERS * 20):
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return base
    raise AssertionError("no free ports")


class LocalCluster:
    """A cluster of this host, driven through its command line."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.chmod(0o755)  # other users must reach the mount
        self.directory = root / "c"
        self.mount = root / "m"
        self.base_port = free_port_block(20)

    @property
    def plan(self) -> Plan:
        """What is running."""
        plan = load_plan(self.directory)
        assert plan is not None
        return plan

    def emberfs(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command `emberfs` on this cluster."""
        command, *rest = arguments
        return run(BIN / "emberfs", command, "--directory", self.directory, *rest, check=check)

    def up(self, *extra: object) -> str:
        """Start everything that is not running, and mount."""
        ports = ("--base-port", self.base_port)
        return self.emberfs("up", "--mount", self.mount, *ports, *extra).stdout

    def pid(self, name: str) -> int:
        """Pid of a running service."""
        pid = processes.running_pid(self.plan.process(name))
        assert pid is not None, f"{name} does not run"
        return pid

    def kill(self, name: str) -> None:
        """kill -9 one service and wait until it is gone."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: processes.running_pid(self.plan.process(name)) is None, 5)

    def start(self, name: str) -> None:
        """Start one service again."""
        processes.start(self.plan.process(name))

    def log(self, name: str) -> str:
        """Everything a service wrote."""
        return self.plan.process(name).log_file.read_text(errors="replace")

    def status(self) -> str:
        """What `emberfs status` prints."""
        return self.emberfs("status").stdout

    def wait_serving(self, timeout_s: float = 60) -> None:
        """Wait until every target serves."""

        def all_serving() -> bool:
            text = self.status()
            states = ("syncing", "waiting", "offline", "lastsrv")
            return "serving" in text and not any(state in text for state in states)

        wait_until(all_serving, timeout_s, pause_s=0.3)

    def fsck(self) -> str:
        """Replicas equal, data sound, blocks owned once; fails the test otherwise."""
        return self.emberfs("fsck").stdout

    def destroy(self) -> None:
        """End every process and the mount, whatever state they are in."""
        if is_ours(str(self.mount)):
            subprocess.run(["fusermount3", "-uz", str(self.mount)], check=False, timeout=20)
        plan = load_plan(self.directory)
        for name in [*plan.service_names(), "fuse"] if plan else []:
            processes.stop(plan.process(name), timeout_s=0.0)
        shutil.rmtree(self.root, ignore_errors=True)


def wait_until(condition: object, timeout_s: float, *, pause_s: float = 0.05) -> None:
    """Poll until `condition()` holds; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(pause_s)


@contextmanager
def local_cluster() -> Iterator[LocalCluster]:
    """A fresh cluster, not yet started; logs are shown when the test fails."""
    cluster = LocalCluster(Path(tempfile.mkdtemp(prefix="ember")))
    try:
        yield cluster
    except BaseException:
        for path in sorted((cluster.directory / "log").glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-40:]
            print(f"--- {path.name}", *tail, sep="\n")
        raise
    finally:
        cluster.destroy()
