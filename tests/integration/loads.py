"""Load processes as a test holds them, and what their histories must show."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))

from emberfs.client.file import connect
from integration import history_load
from integration.harness import wait_until
from integration.history_load import CHUNK_BYTES, QUIET, Job, NativeHandle, prepare
from sim.check_durable import check_acknowledged
from sim.check_linear import check_linear
from sim.history import FOREVER_NS, History, Op, load
from sim.violation import report

END_S = 30.0


class LoadProcess:
    """One history_load.py; `prefix` is put before its command (`ip netns exec ...`)."""

    def __init__(self, job: Job, prefix: Sequence[str] = ()) -> None:
        self.job = job
        self.output = Path(job.output)
        self._progress = Path(job.output + ".progress")
        file = Path(job.output + ".job")
        file.write_text(json.dumps(msgspec.to_builtins(job)))
        self._errors = Path(job.output + ".errors")
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, history_load.__file__, str(file)],
                stdout=errors,
                stderr=errors,
            )

    @property
    def pid(self) -> int:
        """Process id (`ip netns exec` becomes the program itself)."""
        return self._process.pid

    @property
    def operations(self) -> int:
        """How many operations have ended."""
        assert self._process.poll() is None, f"the load has ended: {self._said()}"
        try:
            return int(self._progress.read_text().split()[0])
        except (OSError, IndexError):
            return 0

    def _said(self) -> str:
        return self._errors.read_text()[-3000:]

    def finish(self) -> Path:
        """End it and return its history."""
        self._process.terminate()
        self._process.wait(END_S)
        assert self._process.returncode == 0, self._said()
        return self.output

    def kill(self) -> None:
        """End it whatever its state."""
        self._process.kill()
        self._process.wait()


class Loads:
    """Several load processes on one cluster."""

    def __init__(self, processes: list[LoadProcess]) -> None:
        self.processes = processes
        self._history: History | None = None

    def wait_progress(self, operations: int, timeout_s: float) -> None:
        """Every process ends so many more operations."""
        goals = [process.operations + operations for process in self.processes]
        for process, goal in zip(self.processes, goals, strict=True):
            wait_until(lambda p=process, g=goal: p.operations >= g, timeout_s)

    def finish(self) -> History:
        """End all; return the merged history."""
        if self._history is None:
            self._history = load([process.finish() for process in self.processes])
        return self._history


def make_shared_files(mgmtd: str, cluster: str, directory: str, files: int = 3) -> None:
    """Make the files that several clients share, in full length, before the load.

    On another host: run this file there, `loads.py MGMTD CLUSTER DIRECTORY`.
    """

    async def make() -> None:
        async with connect(mgmtd, cluster=cluster) as system:
            await system.makedirs("/" + directory, exist_ok=True)

            async def open_file(path: str) -> NativeHandle:
                return NativeHandle(await system.open("/" + path, "w", direct=True))

            await prepare(open_file, directory, files)

    asyncio.run(make())


@contextmanager
def loading(jobs: Sequence[Job], prefix: Sequence[str] = (), *, warm: int = 20) -> Iterator[Loads]:
    """Run the jobs beside the block; they are ended at its end in any case."""
    with ExitStack() as stack:
        processes = []
        for job in jobs:
            processes.append(LoadProcess(job, prefix))
            stack.callback(processes[-1].kill)
        loads = Loads(processes)
        loads.wait_progress(warm, 30)
        yield loads


def check_history(history: History, *, allow_errors: bool = False) -> None:
    """No application error, linearizable per chunk, nothing acknowledged lost."""
    failed = [op for op in history if not op.ok and op.result]
    if not allow_errors:
        words = "\n".join(str(op) for op in failed[:10])
        assert not failed, f"{len(failed)} operations failed:\n{words}"
    shared = [op for op in history if is_shared(op)]
    own = [op for op in history if not is_shared(op)]
    verdict = check_linear([*shared, *own], chunk_bytes=CHUNK_BYTES)
    found = verdict.violations + check_acknowledged(history)
    assert not found, report(found)
    assert not verdict.undecided, f"undecided: {verdict.undecided}"
    assert verdict.decided, "nothing was checked"


def is_shared(op: Op) -> bool:
    """Tell the files of several clients from those of one."""
    return str(op.key[1]).startswith("s")


def quiet(history: History) -> list[Op]:
    """Return what happened to the file that nobody writes."""
    return [op for op in history if op.key[1] == QUIET]


def longest_s(
    history: Iterable[Op], kinds: Sequence[str], since_ns: int, until_ns: int = FOREVER_NS
) -> float:
    """How long any operation of these kinds waited, counted from `since_ns` at the earliest.

    Operations that ended before, or began after `until_ns`, do not count.
    """
    waits = [
        (op.end_ns or time.monotonic_ns()) - max(op.start_ns, since_ns)
        for op in history
        if op.kind in kinds and op.start_ns < until_ns and (op.end_ns or FOREVER_NS) > since_ns
    ]
    return max(waits, default=0) / 1e9


def quantile_s(history: Iterable[Op], kind: str, share: float) -> float:
    """A quantile of the durations of the operations of a kind."""
    spans = sorted(
        (op.end_ns - op.start_ns) / 1e9 for op in history if op.kind == kind and op.end_ns
    )
    return spans[min(len(spans) - 1, int(len(spans) * share))] if spans else 0.0


if __name__ == "__main__":
    make_shared_files(*sys.argv[1:4])
