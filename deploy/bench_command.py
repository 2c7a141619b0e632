"""`emberfs bench`: how fast the machine is, how fast the cluster, and what the limit is."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from emberfs.client.file import FileSystem, connect
from emberfs.deploy import stages
from emberfs.deploy.command import HERE, Directory, perform, plan_of, say
from emberfs.deploy.plan import Plan
from emberfs.deploy.stages import BATCH, BLOCK_BYTES, SMALL_BATCH, SMALL_BYTES, Figure
from emberfs.deploy.status import console, size
from emberfs.runtime.env import Env
from emberfs.runtime.real import RealEnv

PLACE = "/.emberfs-bench"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    directory: Directory = HERE,
    seconds: Annotated[float, typer.Option(min=0.1, max=60, help="for each stage")] = 2.0,
) -> None:
    """Measure disk, memory and network, then the running cluster, and say which one is the limit.

    Writes into a directory of its own in the file system, which is removed afterwards.
    """
    plan = plan_of(directory)
    found = perform(_measure(plan, RealEnv(), seconds))
    table = Table("stage", "per second", "operations per second", "cores idle")
    for name, figure in found.items():
        per_s = f"{size(int(figure.bytes_per_s))}/s" if figure.unit_bytes else ""
        whole = name in ("memory", "disk", "network")
        rate = "" if whole else f"{figure.per_s:,.0f}"
        table.add_row(figure.name, per_s, rate, "" if whole else f"{figure.idle_share:.0%}")
    console().print(table)
    say(stages.verdict(found, plan.replicas))


async def _measure(plan: Plan, env: Env, seconds: float) -> dict[str, Figure]:
    where = Path(plan.storage_directories[0] if plan.storage_directories else plan.directory)
    found = {
        "memory": await env.run_blocking(lambda: stages.memory(env, seconds)),
        "disk": await env.run_blocking(lambda: stages.disk(env, seconds, where)),
        "network": await env.run_blocking(lambda: stages.network(env, seconds)),
    }
    async with connect(plan.mgmtd_address, cluster=plan.cluster) as fs:
        await fs.makedirs(PLACE, exist_ok=True)
        try:
            found |= await _cluster(fs, env, seconds)
        finally:
            await fs.rmtree(PLACE)
    return found


async def _cluster(fs: FileSystem, env: Env, seconds: float) -> dict[str, Figure]:
    file = f"{PLACE}/file"
    return {
        "write": await stages.write(fs, env, seconds, file),
        "read": await stages.read(fs, env, seconds, file, BLOCK_BYTES, BATCH),
        "small": await stages.read(fs, env, seconds, file, SMALL_BYTES, SMALL_BATCH),
        "names": await stages.names(fs, env, seconds, PLACE),
    }
