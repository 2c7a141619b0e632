"""`make demo`: real programs on a scratch cluster, then killed servers, with a progress bar.

Everything runs in a temporary directory, on ports of its own, and is removed afterwards. Ends with
a non-zero exit code at the first difference.
"""

import os
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from integration.harness import LocalCluster, local_cluster, run, wait_until

LONG_S = 900
Step = tuple[str, Callable[[LocalCluster], str]]


def standard_library(cluster: LocalCluster) -> str:
    source, copy = Path(sysconfig.get_path("stdlib")), cluster.mount / "stdlib"
    copy.mkdir()
    parts = [part for part in source.iterdir() if part.name != "site-packages"]
    began = time.perf_counter()
    run("cp", "-a", *parts, copy, timeout_s=LONG_S)
    took_s = time.perf_counter() - began
    run("diff", "-r", "--exclude=site-packages", source, copy, timeout_s=LONG_S)
    files = sum(len(names) for _, _, names in os.walk(copy))
    return f"{files} files copied in {took_s:.0f} s ({files / took_s:.0f}/s), diff -r is empty"


def git(cluster: LocalCluster) -> str:
    place = cluster.mount / "stdlib"
    command = (
        "git",
        "-c",
        "gc.auto=0",
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@example.org",
        "-C",
        place,
    )
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"], ["gc", "-q"], ["fsck"]):
        run(*command, *words, timeout_s=LONG_S)
    return "init, add, commit, gc, fsck"


def tar(cluster: LocalCluster) -> str:
    place = cluster.mount / "tar"
    place.mkdir()
    run("tar", "-cf", place / "a.tar", "-C", cluster.mount, "stdlib/asyncio", timeout_s=LONG_S)
    run("tar", "-xf", place / "a.tar", "-C", place, timeout_s=LONG_S)
    run("diff", "-r", cluster.mount / "stdlib/asyncio", place / "stdlib/asyncio", timeout_s=LONG_S)
    return "archived, extracted, equal"


def large_file(cluster: LocalCluster) -> str:
    path = cluster.mount / "large"
    began = time.perf_counter()
    fio(cluster, "large", "write", "1m", "2g", direct=0)
    took_s = time.perf_counter() - began
    path.unlink(missing_ok=True)
    return f"2 GiB written and verified in {took_s:.0f} s"


def fio(cluster: LocalCluster, name: str, pattern: str, block: str, size: str, direct: int) -> None:
    run(
        "fio", f"--name={name}", f"--filename={cluster.mount}/{name}", f"--rw={pattern}",
        f"--bs={block}", f"--size={size}", f"--direct={direct}", "--verify=crc32c",
        "--verify_fatal=1",
            "--verify_state_save=0", "--ioengine=psync", "--end_fsync=1", timeout_s=LONG_S,
    )  # fmt: skip


def fio_matrix(cluster: LocalCluster) -> str:
    count = 0
    for direct in (0, 1):
        for pattern in ("write", "randwrite"):
            for block, size in (("4k", "16m"), ("64k", "64m"), ("1m", "256m")):
                fio(cluster, f"f{direct}{pattern}{block}", pattern, block, size, direct)
                count += 1
    return f"{count} combinations verified"


def killed_server(cluster: LocalCluster) -> str:
    job = subprocess.Popen(
        ["fio", "--name=k", f"--directory={cluster.mount}", "--rw=randwrite", "--bs=64k",
         "--size=128m", "--verify=crc32c", "--verify_fatal=1",
            "--verify_state_save=0", "--fsync=16", "--rate=4m"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(3)
    cluster.kill("storage2")
    time.sleep(8)
    cluster.start("storage2")
    assert job.wait(timeout=LONG_S) == 0, "fio saw an error"
    began = time.monotonic()
    cluster.wait_serving(LONG_S)
    return f"no error; all replicas serve again {time.monotonic() - began:.0f} s after fio ended"


def everything_killed(cluster: LocalCluster) -> str:
    for name in ["fuse", *cluster.plan.service_names()]:
        cluster.kill(name)
    began = time.perf_counter()
    cluster.up()
    took_s = time.perf_counter() - began
    source = Path(sysconfig.get_path("stdlib"), "asyncio")
    wait_until((cluster.mount / "stdlib").exists, 30)
    run("diff", "-r", source, cluster.mount / "stdlib" / "asyncio", timeout_s=LONG_S)
    return f"up again in {took_s:.1f} s, data equal"


def fsck(cluster: LocalCluster) -> str:
    return cluster.fsck().strip().splitlines()[-1]


STEPS: list[Step] = [
    ("standard library: cp -a, diff -r", standard_library),
    ("git in it", git),
    ("tar out and in", tar),
    ("fio --verify, 4 KiB to 1 MiB", fio_matrix),
    ("a 2 GiB file", large_file),
    ("kill -9 of a storage service under fio", killed_server),
    ("kill -9 of everything", everything_killed),
    ("emberfs fsck", fsck),
]


def main() -> None:
    """Run all steps."""
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with local_cluster() as cluster, Progress(*columns, console=console) as progress:
        bar = progress.add_task("start a cluster", total=len(STEPS) + 1)
        cluster.up()
        progress.advance(bar)
        for title, step in STEPS:
            progress.update(bar, description=title)
            began = time.perf_counter()
            result = step(cluster)
            progress.console.print(f"{title}: {result} [{time.perf_counter() - began:.0f} s]")
            progress.advance(bar)


if __name__ == "__main__":
    main()
