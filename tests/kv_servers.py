"""Real etcd clusters and PostgreSQL servers on loopback, in directories of their own.

They die with the test process whatever happens to it. A machine without them fails where a package
manager could install them (deploy/install.sh VENV test), and skips with a reason elsewhere.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from glob import glob
from pathlib import Path

import pytest

START_TIMEOUT_S = 30.0
PROPER = (
    "--max-txn-ops=4096",
    "--max-request-bytes=10485760",
    "--auto-compaction-mode=revision",
    "--auto-compaction-retention=100000",
)


def needed(program: str, package: str) -> str:
    """Return the path of a program, or end the test in the right way."""
    found = shutil.which(program) or next(iter(glob(f"/usr/lib/postgresql/*/bin/{program}")), None)
    if found is None and shutil.which("apt-get"):
        pytest.fail(f"{program} is missing: run deploy/install.sh VENV test")
    if found is None:
        pytest.skip(f"NOT TESTED: {program} (Debian's {package}) is not installed here")
    return found


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a server that is killed when this process dies."""
    with log.open("ab") as out:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command], stdout=out, stderr=out
        )


class Etcd:
    """A cluster of `members` members."""

    def __init__(self, members: int = 3, *flags: str) -> None:
        self.program = needed("etcd", "etcd-server")
        self.flags = flags or PROPER
        self.directory = Path(tempfile.mkdtemp(prefix="emberfs-etcd-"))
        ports = free_ports(2 * members)
        self.clients, self.peers = ports[:members], ports[members:]
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        for index in range(members):
            self.start(index)
        self.await_leader()

    @property
    def hosts(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self.clients)

    def start(self, index: int) -> None:
        client, peer = (f"http://127.0.0.1:{ports[index]}" for ports in (self.clients, self.peers))
        members = ",".join(f"n{i}=http://127.0.0.1:{port}" for i, port in enumerate(self.peers))
        command = [
            self.program,
            f"--name=n{index}",
            f"--data-dir={self.directory}/n{index}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={members}",
            "--logger=zap",
            "--log-level=error",
            *self.flags,
        ]
        self.running[index] = start(command, self.directory / f"n{index}.log")

    def leader(self) -> int | None:
        """Return the index of the leader, None if there is none just now."""
        import grpc

        from emberfs.proto import etcd_pb2 as pb
        from emberfs.proto.etcd_pb2_grpc import MaintenanceStub

        for index in self.running:
            with grpc.insecure_channel(f"127.0.0.1:{self.clients[index]}") as channel:
                try:
                    answer = MaintenanceStub(channel).Status(pb.StatusRequest(), timeout=1)
                except grpc.RpcError:
                    continue
                if answer.leader and answer.leader == answer.header.member_id:
                    return index
        return None

    def await_leader(self) -> int:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            found = self.leader()
            if found is not None:
                return found
            time.sleep(0.1)
        logs = "".join(path.read_text() for path in self.directory.glob("*.log"))
        self.stop()
        raise AssertionError(f"no leader: {logs[-2000:]}")

    def kill(self, index: int) -> None:
        process = self.running.pop(index)
        process.kill()
        process.wait()

    def stop(self) -> None:
        for index in list(self.running):
            self.kill(index)
        shutil.rmtree(self.directory, ignore_errors=True)


class Postgres:
    """A server; it must not run as root, so the user that Debian made for it takes part."""

    def __init__(self, *settings: str) -> None:
        self.programs = Path(needed("initdb", "postgresql")).parent
        self.settings = settings
        self.directory = Path(tempfile.mkdtemp(prefix="emberfs-postgres-"))
        self.data = self.directory / "data"
        self.user: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self.directory, user.pw_uid, user.pw_gid)
            self.user = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        (self.port,) = free_ports(1)
        made = subprocess.run(
            [
                *("setpriv", *self.user, str(self.programs / "initdb"), "-D", str(self.data)),
                *("-A", "trust", "-U", "emberfs", "-E", "UTF8", "--no-sync"),
            ],
            capture_output=True,
            cwd=self.directory,
        )
        assert made.returncode == 0, made.stderr.decode()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"postgres://emberfs@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        command = [
            *self.user,
            str(self.programs / "postgres"),
            *("-D", str(self.data), "-p", str(self.port), "-h", "127.0.0.1"),
            *("-c", f"unix_socket_directories={self.directory}"),
            *(part for setting in self.settings for part in ("-c", setting)),
        ]
        log = self.directory / "log"
        self.process = start(command, log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.05)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.Error:
            return False
        return True

    def kill(self, how: int = signal.SIGQUIT) -> None:
        """SIGQUIT: all of the server ends at once, and recovers at its next start."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
