"""Runs fio and takes what matters from its JSON."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FIO_TIMEOUT_S = 300


class Figure(NamedTuple):
    """What one group of jobs did."""

    iops: float
    bytes_per_s: float
    ios: int
    io_bytes: int
    p99_us: float  # of the completion of a request
    cpu_s: float  # user and system of the jobs, without fio's own start


class FioError(Exception):
    """fio could not do it there."""


def perform(
    arguments: list[str], directory: Path, text: str = "", environment: Mapping[str, str] = {}
) -> dict[str, Figure]:
    """Run fio; returns figures by "JOB read" and "JOB write". Raises FioError."""
    done = subprocess.run(
        ["fio", "--output-format=json", *arguments], input=text, env=os.environ | environment,
        cwd=directory, capture_output=True, text=True, timeout=FIO_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        said = (lines or [done.stderr or done.stdout[-500:]])[0]
        raise FioError(said.replace(str(directory), ""))
    found: dict[str, Figure] = {}
    for job in json.loads(done.stdout[done.stdout.index("{") :])["jobs"]:
        found |= _figures(job)
    return found


def _figures(job: dict[str, Any]) -> dict[str, Figure]:
    found = {}
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    for side in ("read", "write"):
        seen = job[side]
        if seen["total_ios"]:
            p99_us = seen["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1000
            rate = seen["bw_bytes"]
            if side == "write" and job["job options"].get("end_fsync"):
                # fio's figure ends with the last write, not with the sync behind it.
                rate = seen["io_bytes"] / (job["job_runtime"] / 1000)
            found[f"{job['jobname']} {side}"] = Figure(
                seen["iops"], rate, seen["total_ios"], seen["io_bytes"], p99_us, cpu_s
            )
    return found


def job_file(
    path: Path, directory: Path, seconds: int, *, only_files: bool = False, **variables: object
) -> dict[str, Figure]:
    """Run a job file with another runtime.

    `only_files`: lay out what the jobs read, and no more.
    """
    text = re.sub(r"(?m)^runtime=\d+", f"runtime={seconds}", path.read_text())
    if only_files:
        text = text.replace("directory=", "create_only=1\ndirectory=", 1)
    environment = {"DIRECTORY": str(directory)} | {k: str(v) for k, v in variables.items()}
    try:
        return perform(["-"], directory, text, environment)
    except FioError as problem:
        raise FioError(f"{path.name}: {problem}") from None


def one_job(directory: Path, seconds: float = 0.0, **options: object) -> Figure:
    """One group of jobs from options; for so long, or once over the file if no time is given."""
    given: dict[str, object] = {"ioengine": "psync", "directory": directory}
    if seconds:
        given |= {"runtime": f"{max(int(seconds * 1000), 1)}ms", "time_based": 1}
    arguments = [f"--{key}={value}" for key, value in (given | options).items()]
    found = perform(["--name=bench", "--group_reporting", *arguments], directory)
    if len(found) != 1:
        raise FioError(f"{options}: it did {', '.join(found) or 'nothing'}")
    (figure,) = found.values()
    return figure
