"""Random outages under load, until the time is up; then everything must be there and equal.

usage: python tests/integration/soak.py SECONDS SEED

Several writers, fio with verification and a process of namespace operations, each with a model,
and clients whose histories are recorded (history_load.py) work while services are killed, frozen
and started again at random: at most replicas - 1 storages at a time, sometimes everything at once.
Exit 0 if the models agree, the history is linearizable and has lost nothing, and fsck is clean.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from integration import names
from integration.harness import LocalCluster, local_cluster, wait_until
from integration.kill_matrix import jobs_of
from integration.loads import Loads, check_history, loading
from integration.writer import Writer

WRITERS = 3
STORAGES = ("storage1", "storage2", "storage3")
PROGRESS_S = 75.0  # a request's deadline is 60 s: within it, it succeeds or its writer says why


class Soak:
    """One run."""

    def __init__(self, cluster: LocalCluster, seed: int) -> None:
        self._cluster = cluster
        self._choose = random.Random(seed)
        self._began = time.monotonic()
        self.counts: Counter[str] = Counter()
        self._workers: dict[str, Writer] = {}
        self._recorded: Loads | None = None

    def say(self, text: str) -> None:
        """Print with the time since the start."""
        print(f"{time.monotonic() - self._began:7.1f} {text}", flush=True)

    @contextmanager
    def load(self, seed: int) -> Iterator[None]:
        """Everything that writes, from here to the end of the block; then it is compared."""
        cluster, root = self._cluster, self._cluster.root
        for number in range(WRITERS):
            name = f"w{number}"
            self._workers[name] = Writer(cluster.mount / name, root / f"{name}.p", seed + number)
        self._workers["names"] = Writer(cluster.mount / "n", root / "n.p", seed, names.__file__)
        with ExitStack() as stack:
            for worker in self._workers.values():
                stack.callback(worker.kill)
            self._recorded = stack.enter_context(loading(jobs_of(cluster, "h", seed)))
            yield
            history = self._recorded.finish()
            check_history(history)
            self.say(f"{len(history)} recorded operations are linearizable and nothing is lost")
            for name, worker in self._workers.items():
                self.say(f"{name}: {worker.rounds} operations, longest {worker.longest_s:.1f} s")
                worker.finish()

    def fio(self) -> subprocess.Popen[str]:
        """Write at random, and verify, again and again until killed."""
        return subprocess.Popen(
            [
                "fio", "--name=v", f"--directory={self._cluster.mount}", "--rw=randwrite",
                "--bs=16k", "--size=16m", "--verify=crc32c", "--verify_fatal=1", "--fsync=16",
                "--ioengine=psync", "--rate_iops=100",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def outage(self) -> None:
        """One outage, from its beginning to the last service's return."""
        kinds = ["kill", "kill two", "flap", "freeze", "freeze long", "meta", "mgmtd"]
        kind = self._choose.choice([*kinds, "mixed", "all", "lose disk"])
        self.counts[kind] += 1
        method = {
            "kill": lambda: self._kill([self._storage()], 9),
            "kill two": lambda: self._kill(self._choose.sample(STORAGES, 2), 12),
            "flap": self._flap,
            "freeze": lambda: self._freeze([self._storage()], 2),
            "freeze long": lambda: self._freeze([self._storage()], 9),
            "meta": lambda: self._kill(["meta"], 2),
            "mgmtd": lambda: self._kill(["mgmtd"], 9),
            "mixed": lambda: self._kill(["mgmtd", "meta", self._storage()], 8),
            "all": self._all,
            "lose disk": self._lose_disk,
        }[kind]
        self.say(kind)
        method()

    def _storage(self) -> str:
        return self._choose.choice(STORAGES)

    def _wait(self, longest_s: float) -> None:
        time.sleep(self._choose.random() * longest_s)

    def _kill(self, services: list[str], longest_s: float) -> None:
        for name in services:
            self._cluster.kill(name)
            self._wait(longest_s / 3)
        self._wait(longest_s)
        self._choose.shuffle(services)
        for name in services:
            self._cluster.start(name)
            self._wait(2)

    def _flap(self) -> None:
        name = self._storage()
        for _ in range(4):
            self._kill([name], 1.5)

    def _freeze(self, services: list[str], longest_s: float) -> None:
        pids = [self._cluster.pid(name) for name in services]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        self._wait(longest_s)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    def _all(self) -> None:
        services = self._cluster.plan.service_names()
        self._choose.shuffle(services)
        for name in services:
            self._cluster.kill(name)
        self._wait(8)
        self._cluster.up()

    def _lose_disk(self) -> None:
        # Without one replica's data, the others must be complete: only then may a disk go.
        self._cluster.wait_serving(120)
        name = self._storage()
        self._cluster.kill(name)
        subprocess.run(["rm", "-rf", str(self._cluster.plan.path("data", name))], check=True)
        self._wait(8)
        self._cluster.start(name)
        self._cluster.wait_serving(120)

    def progress(self) -> None:
        """Every worker goes on within the deadline of a request."""
        before = {name: worker.rounds for name, worker in self._workers.items()}
        began = time.monotonic()
        for name, worker in self._workers.items():
            wait_until(lambda w=worker, n=name: w.rounds > before[n], PROGRESS_S)
        assert self._recorded is not None
        self._recorded.wait_progress(3, PROGRESS_S)
        if time.monotonic() - began > 3:
            self.say(f"  going on after {time.monotonic() - began:.1f} s")

    def run(self, seconds: float, seed: int) -> None:
        """Outages until the time is up, then the comparison."""
        with self.load(seed):
            fio, until = self.fio(), time.monotonic() + seconds
            try:
                while time.monotonic() < until:
                    self._wait(4)
                    self.outage()
                    self.progress()
                    if (code := fio.poll()) is not None:
                        assert code == 0, fio.communicate()[0]
                        self.counts["fio runs"] += 1
                        fio = self.fio()
                output, _ = fio.communicate(timeout=120)
                assert fio.returncode == 0, output
            finally:
                fio.kill()
                with suppress(ValueError):
                    fio.communicate()
            self._cluster.wait_serving(120)
        subprocess.run(["sync", "-f", str(self._cluster.mount)], check=True, timeout=60)
        self.say(self._cluster.fsck().splitlines()[-1])


def main() -> None:
    """Run one soak."""
    seconds, seed = float(sys.argv[1]), int(sys.argv[2])
    with local_cluster() as cluster:
        cluster.up()
        soak = Soak(cluster, seed)
        try:
            soak.run(seconds, seed)
        except BaseException:
            soak.say(cluster.emberfs("status", check=False).stdout)
            keep = f"/tmp/soak-{seed}.log"
            subprocess.run(["cp", "-r", str(cluster.directory / "log"), keep], check=False)
            raise
        soak.say(f"all is well: {dict(soak.counts)}")


if __name__ == "__main__":
    main()
