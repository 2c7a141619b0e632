"""Several hosts on one machine: a network namespace each, joined by a bridge in one of its own.

    ctl (mgmtd, meta)   s1 s2 s3 (a storage each)   cl (clients)        10.77.0.x, tcp only

The network of the machine is never touched: even the bridge lives in a namespace. Partitions are
nftables rules inside the host that is cut off, or its cable is pulled (ip link set down).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from emberfs.deploy.plan import Plan, write_plan
from integration.harness import BIN, run, wait_until

CONTROL, CLIENT = "ctl", "cl"
STORAGES = ("s1", "s2", "s3")
HOSTS = {CONTROL: 1, CLIENT: 2, "s1": 11, "s2": 12, "s3": 13}
CLUSTER = "local"
MGMTD_PORT, META_PORT, STORAGE_PORT = 9400, 9410, 9420

CREATE_CHAINS = """
import asyncio, sys
from emberfs.client.control import Control
async def main():
    control = Control((sys.argv[1],), sys.argv[2])
    await control.create_chains([(1, (1101, 1201, 1301)), (2, (1202, 1302, 1102)),
                                 (3, (1303, 1103, 1203))])
    await control.close()
asyncio.run(main())
"""


def refusal() -> str:
    """Say why namespaces cannot be used here; "" if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "nft", "nsenter"):
        if shutil.which(program) is None:
            return f"{program} is missing: apt-get install iproute2 nftables util-linux"
    name = f"eprobe{os.getpid()}"
    made = run("ip", "netns", "add", name, check=False)
    if made.returncode:
        return f"network namespaces are not permitted: {made.stderr.strip()}"
    try:
        rules = run(
            "nsenter", f"--net=/run/netns/{name}", "nft", "add", "table", "inet", "t", check=False
        )
    finally:
        run("ip", "netns", "delete", name)
    return f"nftables do not work: {rules.stderr.strip()}" if rules.returncode else ""


def address(host: str) -> str:
    """Return the address of a host."""
    return f"10.77.0.{HOSTS[host]}"


class Hosts:
    """The hosts, and what runs on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mgmtd = f"{address(CONTROL)}:{MGMTD_PORT}"
        self._prefix = f"e{os.getpid()}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._data = {host: root / "data" / host for host in HOSTS}

    # ------------------------------------------------------------ network

    def _namespace(self, host: str) -> str:
        return f"{self._prefix}{host}"

    def on(self, host: str) -> list[str]:
        """Return the words before a command that make it run on a host."""
        return ["nsenter", f"--net=/run/netns/{self._namespace(host)}"]

    def build(self, stack: ExitStack) -> None:
        """Make namespaces, bridge and cables."""
        for name in ("br", *HOSTS):
            run("ip", "netns", "add", self._namespace(name))
            stack.callback(run, "ip", "netns", "delete", self._namespace(name), check=False)
            run(*self.on(name), "ip", "link", "set", "lo", "up")
        run(*self.on("br"), "ip", "link", "add", "br0", "type", "bridge")
        run(*self.on("br"), "ip", "link", "set", "br0", "up")
        for host in HOSTS:
            cable = f"v{host}"
            run(
                *self.on("br"), "ip", "link", "add", cable, "type", "veth",
                "peer", "name", "eth0", "netns", self._namespace(host),
            )  # fmt: skip
            run(*self.on("br"), "ip", "link", "set", cable, "master", "br0", "up")
            run(*self.on(host), "ip", "address", "add", f"{address(host)}/24", "dev", "eth0")
            run(*self.on(host), "ip", "link", "set", "eth0", "up")

    @contextmanager
    def cut(
        self, host: str, others: Sequence[str] = (), *, hears: bool = False, talks: bool = False
    ) -> Iterator[None]:
        """Drop all packets between a host and others (default: all), or those of one direction."""
        peers = ", ".join(address(other) for other in others or HOSTS if other != host)
        rules = ["table inet cut {"]
        if not hears:
            rules += ["chain in { type filter hook input priority 0;"]
            rules += [f"ip saddr {{ {peers} }} drop; }}"]
        if not talks:
            rules += ["chain out { type filter hook output priority 0;"]
            rules += [f"ip daddr {{ {peers} }} drop; }}"]
        run(*self.on(host), "nft", "\n".join([*rules, "}"]))
        try:
            yield
        finally:
            run(*self.on(host), "nft", "delete", "table", "inet", "cut")

    @contextmanager
    def unplugged(self, host: str) -> Iterator[None]:
        """Pull the cable of a host."""
        run(*self.on("br"), "ip", "link", "set", f"v{host}", "down")
        try:
            yield
        finally:
            run(*self.on("br"), "ip", "link", "set", f"v{host}", "up")

    # ------------------------------------------------------------ services

    def start(self, stack: ExitStack) -> None:
        """Start all services, create the chains, wait until every target serves."""
        (self.root / "config").mkdir()
        stack.callback(self._end_all)
        self._service("mgmtd", CONTROL, 1, listen=f"0.0.0.0:{MGMTD_PORT}")
        self._service(
            "meta", CONTROL, 2, mgmtd=[self.mgmtd], listen=[f"tcp://{address(CONTROL)}:{META_PORT}"]
        )
        for host in STORAGES:
            listen = [f"tcp://{address(host)}:{STORAGE_PORT}"]
            self._service(
                "storage", host, HOSTS[host], mgmtd=[self.mgmtd], listen=listen, targets=3
            )
        # `emberfs` on the control host finds mgmtd at 127.0.0.1.
        plan = Plan(directory=str(self.root / "c"), mountpoint="", base_port=MGMTD_PORT)
        write_plan(plan)
        wait_until(lambda: "1303" in self.emberfs("status", check=False), 30, pause_s=0.3)
        run(*self.on(CONTROL), sys.executable, "-c", CREATE_CHAINS, self.mgmtd, CLUSTER)
        self.wait_serving(30)

    def _service(self, kind: str, host: str, node: int, **settings: object) -> None:
        name = f"{kind}-{host}"
        data = self._data[host] / kind
        data.mkdir(parents=True)
        rows: dict[str, object] = {"cluster": CLUSTER, "node": node, "data": str(data), **settings}
        text = "".join(f"{key} = {_toml(value)}\n" for key, value in rows.items())
        config = self.root / "config" / f"{name}.toml"
        config.write_text(text)
        with (self.root / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*self.on(host), BIN / f"emberfs-{kind}", "--config", config],
                stdout=log, stderr=log,
            )  # fmt: skip

    def _end_all(self) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGKILL)
            process.wait()

    def emberfs(self, command: str, *, check: bool = True) -> str:
        """Run `emberfs` on the control host."""
        done = run(
            *self.on(CONTROL), BIN / "emberfs", command, "--directory", self.root / "c", check=check
        )
        return done.stdout

    def wait_serving(self, timeout_s: float = 60) -> None:
        """Wait until every target serves."""

        def all_serving() -> bool:
            text = self.emberfs("status", check=False)
            states = ("syncing", "waiting", "offline", "lastsrv")
            return text.count("serving") >= 18 and not any(state in text for state in states)

        wait_until(all_serving, timeout_s, pause_s=0.3)

    def show_logs(self) -> None:
        """Print the ends of all logs."""
        for path in sorted(self.root.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-25:]
            print(f"--- {path.name}", *lines, sep="\n")


def _toml(value: object) -> str:
    return json.dumps(value)


@contextmanager
def several_hosts() -> Iterator[Hosts]:
    """A running cluster on five hosts; nothing of it is left afterwards."""
    root = Path(tempfile.mkdtemp(prefix="ember"))
    hosts = Hosts(root)
    try:
        with ExitStack() as stack:
            hosts.build(stack)
            hosts.start(stack)
            yield hosts
    except BaseException:
        hosts.show_logs()
        raise
    finally:
        shutil.rmtree(root, ignore_errors=True)
