"""What the commands share: messages, failures, the plan of a cluster, a connection to it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from emberfs.client.cluster import Cluster
from emberfs.client.file import FileSystem, process_caller, process_umask
from emberfs.deploy.plan import Plan, load_plan
from emberfs.deploy.status import console
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import SECOND
from emberfs.runtime.real import RealEnv
from emberfs.runtime.service import explain

T = TypeVar("T")

Directory = Annotated[
    Path, typer.Option("--directory", "-d", help="where the local cluster keeps everything")
]
HERE = Path(".emberfs")
CONNECT_TIMEOUT_NS = 10 * SECOND


def say(text: str) -> None:
    """Print one line for people."""
    console().print(text, markup=False, soft_wrap=True)


def fail(message: str) -> NoReturn:
    """End the command with one line on stderr."""
    print(f"emberfs: {message}", file=sys.stderr)
    raise SystemExit(1)


def perform(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; a failure is one line."""
    try:
        return asyncio.run(work)
    except (EmberfsError, OSError) as problem:
        fail(explain(problem))


def plan_of(directory: Path) -> Plan:
    """Return the plan of an existing local cluster."""
    try:
        plan = load_plan(directory.absolute())
    except EmberfsError as problem:
        fail(problem.message)
    if plan is None:
        fail(f"no cluster in {directory.absolute()}: run `emberfs up` first, or pass --directory")
    return plan


def inside(plan: Plan, path: str) -> bytes:
    """Return a path of the file system; one under the mount point may be given too."""
    mountpoint = Path(plan.mountpoint)
    place = Path(path).absolute()
    if path and place.is_relative_to(mountpoint):
        path = "/" + str(place.relative_to(mountpoint))
    return os.fsencode(path)


async def connect(plan: Plan) -> Cluster:
    """Connect to the servers of a plan, not as a client that has files open."""
    return await Cluster.open(
        RealEnv(),
        (plan.mgmtd_address,),
        plan.cluster,
        register=False,
        timeout_ns=CONNECT_TIMEOUT_NS,
    )


@asynccontextmanager
async def file_system(plan: Plan) -> AsyncIterator[FileSystem]:
    """The tree as the user of this process sees it, for calls on names only."""
    cluster = await connect(plan)
    try:
        yield FileSystem(cluster, process_caller(), process_umask())
    finally:
        await cluster.close()
