"""The kill matrix: every service, in every role, killed and frozen at random moments under load.

usage: python tests/integration/kill_matrix.py [REPEAT [SEED [ROLES [SIGNALS]]]]     (by commas)

One chain of three storages (so that a storage has one role), a load through the library and one
through the mount. After every outage: no operation failed, the history is linearizable and nothing
acknowledged is missing, replicas are byte-equal, the mount's daemon is the same process. Figures:
how long the slowest write and the slowest read waited, counted from the signal. That is stricter
than "when did the first one succeed again".
"""

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))

from emberfs.client.control import Control
from emberfs.deploy import processes
from emberfs.deploy.plan import STORAGE_NODE_FIRST, Plan, write_plan
from emberfs.proto.cluster import Chain
from integration.harness import LocalCluster, local_cluster, wait_until
from integration.history_load import Job
from integration.loads import (
    Loads,
    check_history,
    loading,
    longest_s,
    make_shared_files,
    quantile_s,
    quiet,
)
from sim.history import History

ROLES = ("head", "middle", "tail", "meta", "mgmtd")
SIGNALS = ("kill", "freeze")
LEASE_S = 5.0
WRITES_LIMIT_S = 6.0  # DESIGN section 8
READS_LIMIT_S = 0.5


class Outage(NamedTuple):
    """What one outage cost."""

    role: str
    how: str
    service: str
    outage_s: float  # from the signal to the restart or SIGCONT
    writes_s: float  # the longest wait of a write, from the signal on
    reads_s: float  # of a file that nobody writes
    mixed_s: float  # of chunks that have a write under way: may have to wait as writes do
    whole_s: float  # until every target served again

    def __str__(self) -> str:
        return (
            f"{self.role:7} {self.how:6} {self.service:8} for {self.outage_s:4.1f} s: "
            f"writes {self.writes_s:5.2f} s, reads {self.reads_s:5.2f} s, "
            f"of what is being written {self.mixed_s:5.2f} s, whole after {self.whole_s:4.1f} s"
        )


@contextmanager
def one_chain() -> Iterator[LocalCluster]:
    """Start a cluster whose storages are head, middle and tail of one chain."""
    with local_cluster() as cluster:
        plan = Plan(
            directory=str(cluster.directory),
            mountpoint=str(cluster.mount),
            base_port=cluster.base_port,
            targets_per_storage=1,
        )
        write_plan(plan)
        cluster.up()
        yield cluster


def chain_of(plan: Plan) -> Chain:
    """Ask mgmtd for the only chain."""

    async def ask() -> Chain:
        control = Control((plan.mgmtd_address,), plan.cluster)
        try:
            (chain,) = (await control.routing()).chains.values()
        finally:
            await control.close()
        return chain

    return asyncio.run(ask())


def service_of(plan: Plan, role: str) -> str:
    """Name the service that has a role now; every target must serve."""
    if role not in ("head", "middle", "tail"):
        return role
    serving = chain_of(plan).serving()
    assert len(serving) == 3, "not every target serves"
    place = serving[("head", "middle", "tail").index(role)]
    return plan.storage_names()[place.node - STORAGE_NODE_FIRST]


def jobs_of(cluster: LocalCluster, name: str, seed: int) -> list[Job]:
    """One load through the library, one through the mount, on files of their own."""
    plan = cluster.plan
    make_shared_files(plan.mgmtd_address, plan.cluster, name)
    job = Job(number=1, seed=seed, output="", directory=name)
    replace = msgspec.structs.replace
    return [
        replace(
            job, output=str(cluster.root / f"{name}.1"), mgmtd=plan.mgmtd_address,
            cluster=plan.cluster,
        ),
        replace(job, number=2, output=str(cluster.root / f"{name}.2"), mount=str(cluster.mount)),
    ]  # fmt: skip


def strike(cluster: LocalCluster, service: str, how: str, outage_s: float) -> int:
    """Take a service away for a while; returns when it began (CLOCK_MONOTONIC, ns)."""
    pid = cluster.pid(service)
    began_ns = time.monotonic_ns()
    if how == "kill":
        cluster.kill(service)
        time.sleep(outage_s)
        cluster.start(service)
        return began_ns
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(outage_s)
    finally:
        os.kill(pid, signal.SIGCONT)
    return began_ns


def outage(cluster: LocalCluster, role: str, how: str, seed: int) -> Outage:
    """Perform one cell of the matrix, with all its checks."""
    choose = random.Random(f"{role} {how} {seed}")
    cluster.wait_serving()
    service, daemon = service_of(cluster.plan, role), cluster.pid("fuse")
    name = f"{role}-{how}-{seed}"
    with loading(jobs_of(cluster, name, seed), warm=10) as loads:
        time.sleep(choose.random())
        outage_s = LEASE_S + 1 + choose.random() * 2 if how == "freeze" else choose.random() * 7
        began_ns = strike(cluster, service, how, outage_s)
        loads.wait_progress(10, 30)
        cluster.wait_serving()
        whole_s = (time.monotonic_ns() - began_ns) / 1e9
        history = loads.finish()
    stop_ns = began_ns + int(whole_s * 1e9)
    writes_s = longest_s(history, ("write",), began_ns, stop_ns)
    reads_s = longest_s(quiet(history), ("read",), began_ns, stop_ns)
    mixed_s = longest_s(history, ("read",), began_ns, stop_ns)
    found = Outage(role, how, service, outage_s, writes_s, reads_s, mixed_s, whole_s)
    print(found, flush=True)
    settle(cluster, history, daemon)
    return found


def settle(cluster: LocalCluster, history: History, daemon: int) -> None:
    """Nothing was lost, nothing lied, nothing died that nobody killed."""
    check_history(history)
    assert cluster.pid("fuse") == daemon, "the mount's daemon has died"
    assert os.statvfs(cluster.mount).f_blocks
    assert "clean:" in cluster.fsck()


def frozen_client(cluster: LocalCluster, seed: int) -> None:
    """Freeze a client past its lease while others write; its late writes must fit the history."""
    cluster.wait_serving()
    with loading(jobs_of(cluster, f"frozen-{seed}", seed)) as loads:
        frozen = loads.processes[0].pid
        os.kill(frozen, signal.SIGSTOP)
        try:
            time.sleep(LEASE_S + 2)
        finally:
            os.kill(frozen, signal.SIGCONT)
        loads.wait_progress(20, 30)
        history = loads.finish()
    settle(cluster, history, cluster.pid("fuse"))


def rolling_restart(cluster: LocalCluster, seed: int) -> float:
    """Stop and start every storage in turn; returns the p99 of reads meanwhile, seconds."""
    cluster.wait_serving()
    daemon = cluster.pid("fuse")
    with loading(jobs_of(cluster, f"rolling-{seed}", seed)) as loads:
        for name in cluster.plan.storage_names():
            processes.stop(cluster.plan.process(name), timeout_s=20)
            cluster.start(name)
            _wait_back(cluster, loads)
        history = loads.finish()
    p99_s = quantile_s(history, "read", 0.99)
    print(f"rolling restart: {len(history)} operations, reads p99 {p99_s * 1e3:.0f} ms")
    settle(cluster, history, daemon)
    return p99_s


def _wait_back(cluster: LocalCluster, loads: Loads) -> None:
    wait_until(lambda: len(chain_of(cluster.plan).serving()) == 3, 40, pause_s=0.2)
    loads.wait_progress(5, 30)


def table(found: list[Outage]) -> str:
    """Return p50 and max for every role, with the limits."""
    lines = [f"limits: writes < {WRITES_LIMIT_S} s, reads < {READS_LIMIT_S} s after a kill"]
    for role in ROLES:
        for how in SIGNALS:
            rows = [one for one in found if (one.role, one.how) == (role, how)]
            if not rows:
                continue
            spans = {
                "writes": [row.writes_s for row in rows],
                "reads": [row.reads_s for row in rows],
                "of what is being written": [row.mixed_s for row in rows],
            }
            words = [f"{k} p50 {median(v):5.2f} max {max(v):5.2f} s" for k, v in spans.items()]
            lines.append(f"{role:7} {how:6} x {len(rows):2}: " + ", ".join(words))
    return "\n".join(lines)


def main() -> None:
    """Run the long form."""
    repeat = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    roles = sys.argv[3].split(",") if len(sys.argv) > 3 else ROLES
    signals = sys.argv[4].split(",") if len(sys.argv) > 4 else SIGNALS
    found: list[Outage] = []
    with one_chain() as cluster:
        try:
            for seed in range(first, first + repeat):
                for role in roles:
                    found += [outage(cluster, role, how, seed) for how in signals]
        finally:
            print(table(found))


if __name__ == "__main__":
    main()
