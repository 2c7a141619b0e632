"""The command `emberfs`."""

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from emberfs.client.control import Control
from emberfs.deploy import bench_command, local_cluster, meta_store, processes, tree_commands
from emberfs.deploy import doctor as doctor_checks
from emberfs.deploy.command import HERE, Directory, connect, fail, inside, perform, plan_of, say
from emberfs.deploy.fsck import GRACE_NS, Options, Report, check
from emberfs.deploy.plan import Plan, load_plan, write_plan
from emberfs.deploy.status import console, show, size
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import SECOND, TargetId
from emberfs.runtime.real import RealEnv
from emberfs.runtime.service import explain

app = typer.Typer(
    help="emberfs: a distributed file system for AI work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

meta_app = typer.Typer(no_args_is_help=True, help="Backups of the metadata, and moves to a store.")
app.add_typer(meta_app, name="meta")

# A mount point has `parser=Path`: typer's own conversion would stat it, and so wait for a mount
# whose servers are down, the very ones that `up` is to start.


@app.command()
def up(
    directory: Directory = HERE,
    mount: Annotated[
        Path | None,
        typer.Option(help="mount point (default ./mnt)", parser=Path, metavar="PATH"),
    ] = None,
    base_port: Annotated[
        int | None, typer.Option(min=1024, max=65_000, help="first TCP port (default 9400)")
    ] = None,
    storages: Annotated[
        int | None, typer.Option(min=1, max=99, help="storage services (default 3)")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, max=99, help="copies of all data (default 3)")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="metadata in etcd://..., postgres://... or fdb://... (default: here)"),
    ] = None,
    metas: Annotated[
        int | None,
        typer.Option("--meta", min=1, help="metadata servers; several need --store (default 1)"),
    ] = None,
    no_mount: Annotated[bool, typer.Option("--no-mount", help="only the servers")] = False,
) -> None:
    """Start a whole cluster on this host and mount it. Harmless when it runs already."""
    directory = directory.absolute()
    try:
        earlier = load_plan(directory)
    except EmberfsError as problem:
        fail(problem.message)
    plan = earlier or Plan(directory=str(directory), mountpoint=str(Path("mnt").absolute()))
    if (
        earlier
        and (storages or replicas)
        and (storages, replicas) != (storages and plan.storages, replicas and plan.replicas)
    ):
        fail("storages and replicas are fixed once the cluster exists; use another --directory")
    if earlier and store not in (None, plan.store):
        fail("the store is fixed once the cluster exists; move it with `emberfs meta dump`, `load`")
    if earlier and metas is not None and metas < earlier.metas:
        fail(
            f"the cluster has {earlier.metas} metadata servers; `up` adds some and takes none away"
        )
    wanted = {
        "store": store,
        "metas": metas,
        "mountpoint": str(mount.absolute()) if mount else None,
        "base_port": base_port,
        "storages": storages,
        "replicas": replicas,
    }
    plan = msgspec.structs.replace(plan, **{k: v for k, v in wanted.items() if v is not None})
    _refuse_fatal(plan)
    perform(_up(plan, mount=not no_mount))


def _refuse_fatal(plan: Plan) -> None:
    for finding in _findings(plan):
        if finding.grade == doctor_checks.Grade.FATAL:
            fail(f"{finding.subject}: {finding.seen}; {finding.remedy}")


def _findings(plan: Plan) -> list[doctor_checks.Finding]:
    ports = [] if _runs(plan, "mgmtd") else [plan.base_port]
    names = [*plan.service_names(), "fuse"]
    ports += [plan.metrics_port(name) for name in names if not _runs(plan, name)]
    return doctor_checks.examine(RealEnv(), Path(plan.directory), ports)


def _runs(plan: Plan, name: str) -> bool:
    return processes.running_pid(plan.process(name)) is not None


async def _up(plan: Plan, *, mount: bool) -> None:
    env = RealEnv()
    routing = await local_cluster.bring_up(env, plan, say, mount=mount)
    console().print(await show(env, routing, plan))
    place = plan.mountpoint
    say("")
    say("Try next:")
    if mount:
        say(f"  cp -a /usr/share/doc {place}/ && diff -r /usr/share/doc {place}/doc")
        if shutil.which("fio"):
            say(f"  fio --name=demo --directory={place} --rw=randwrite --size=64m --verify=crc32c")
    say("  emberfs status      emberfs fsck      emberfs doctor      emberfs down")


@app.command()
def down(
    directory: Directory = HERE,
    force: Annotated[bool, typer.Option("--force", help="detach a busy mount")] = False,
) -> None:
    """Unmount and stop the local cluster; data is kept."""
    plan = plan_of(directory)
    try:
        local_cluster.bring_down(plan, say, force=force)
    except EmberfsError as problem:
        fail(problem.message)


@app.command("clean-data")
def clean_data(directory: Directory = HERE) -> None:
    """Delete a stopped local cluster with all its data, also that in a shared store."""
    try:
        plan = load_plan(directory.absolute())
        if plan is not None and plan.store:
            local_cluster.refuse_running(plan)
            perform(meta_store.clear(RealEnv(), plan.store, plan.cluster))
        local_cluster.clean_data(directory.absolute())
    except EmberfsError as problem:
        fail(problem.message)


@app.command()
def mount(
    directory: Directory = HERE,
    mountpoint: Annotated[
        Path | None, typer.Argument(help="mount point", parser=Path, metavar="PATH")
    ] = None,
) -> None:
    """Mount the local cluster (again), also over a dead mount."""
    plan = plan_of(directory)
    if mountpoint:
        plan = msgspec.structs.replace(plan, mountpoint=str(mountpoint.absolute()))
        write_plan(plan)
    perform(local_cluster.mount_here(RealEnv(), plan, say))


@app.command()
def umount(
    directory: Directory = HERE,
    force: Annotated[bool, typer.Option("--force", help="detach a busy mount")] = False,
) -> None:
    """Unmount the local cluster; the servers go on."""
    try:
        local_cluster.unmount_here(plan_of(directory), say, force=force)
    except EmberfsError as problem:
        fail(problem.message)


@app.command()
def status(directory: Directory = HERE) -> None:
    """Show nodes, chains, targets, space, and how each server is reached and why."""
    plan = plan_of(directory)
    perform(_status(plan))


async def _status(plan: Plan) -> None:
    control = Control((plan.mgmtd_address,), plan.cluster)
    try:
        routing = await control.routing()
    finally:
        await control.close()
    console().print(await show(RealEnv(), routing, plan))


@app.command()
def doctor(directory: Directory = HERE) -> None:
    """Check this host; each finding comes with its remedy."""
    directory = directory.absolute()
    try:
        plan = load_plan(directory) or Plan(directory=str(directory), mountpoint="mnt")
    except EmberfsError as problem:
        fail(problem.message)
    table = Table("", "what", "seen", "remedy")
    marks = {0: "[green]ok[/]", 1: "[yellow]warning[/]", 2: "[red]fatal[/]"}
    findings = _findings(plan)
    for finding in findings:
        table.add_row(marks[finding.grade], finding.subject, finding.seen, finding.remedy)
    console().print(table)
    raise SystemExit(any(f.grade == doctor_checks.Grade.FATAL for f in findings))


@app.command()
def fsck(
    path: Annotated[str, typer.Argument(help="only this file or subtree (default: all)")] = "",
    directory: Directory = HERE,
    verify: Annotated[bool, typer.Option(help="read all data and compare its checksums")] = True,
    repair: Annotated[bool, typer.Option("--repair", help="mend what is found")] = False,
    grace: Annotated[
        float, typer.Option(help="seconds that chunks without a file stay before --repair")
    ] = GRACE_NS / SECOND,
    trust: Annotated[
        int, typer.Option(help="target that is right where replicas differ and none is newer")
    ] = 0,
) -> None:
    """Check names, link counts, chunks, replicas and blocks of a running cluster.

    Without --repair nothing is changed; with it every change is printed first. What is mended: link
    counts and counters; names that lead nowhere (dropped); inodes without a name (attached under
    /lost+found as #inode); replicas that differ or are damaged (replaced from a good one); chunks
    without a file (removed).

    Exit status: 0 clean (or everything mended), 1 findings are left, 2 it could not check.
    """
    try:
        plan = plan_of(directory)
    except SystemExit:
        raise SystemExit(2) from None
    options = Options(
        path=inside(plan, path),
        verify=verify,
        repair=repair,
        trusted=TargetId(trust) if trust else None,
        grace_ns=int(grace * SECOND),
    )
    try:
        report = asyncio.run(_fsck(plan, options))
    except (EmberfsError, OSError) as problem:
        print(f"emberfs: could not check: {explain(problem)}", file=sys.stderr)
        raise SystemExit(2) from None
    if report.findings:
        print(f"emberfs: fsck leaves {len(report.findings)} findings", file=sys.stderr)
        raise SystemExit(1)
    files = f"{report.inodes} inodes, " if report.inodes else ""
    say(f"clean: {files}{report.chunks} chunks, {size(report.bytes)}, all replicas byte-equal")


async def _fsck(plan: Plan, options: Options) -> Report:
    cluster = await connect(plan)
    try:
        return await check(cluster, say, options)
    finally:
        await cluster.close()


StoreUrl = Annotated[
    str, typer.Option("--store", help="URL of the store (default: that of the local cluster)")
]
MgmtdUrl = Annotated[
    str, typer.Option("--mgmtd-store", help="URL of the store of mgmtd, if it has one of its own")
]


def _stores(directory: Path, store: str, mgmtd: str) -> meta_store.Stores:
    return meta_store.Stores(store, mgmtd) if store else meta_store.stores_of(plan_of(directory))


@meta_app.command("dump")
def meta_dump(
    file: Annotated[Path, typer.Argument(help="new file")],
    directory: Directory = HERE,
    store: StoreUrl = "",
    mgmtd_store: MgmtdUrl = "",
    stopped: Annotated[
        bool, typer.Option("--stopped", help="nobody writes: one moment is as good as another")
    ] = False,
) -> None:
    """Write all metadata of one moment to a file, with checksums. RocksDB's: services stopped."""
    stores = _stores(directory, store, mgmtd_store)
    count = perform(meta_store.dump(RealEnv(), stores, file, stopped=stopped))
    say(f"{count} rows, {size(file.stat().st_size)} in {file}")


@meta_app.command("load")
def meta_load(
    file: Annotated[Path, typer.Argument(help="of `emberfs meta dump`")],
    directory: Directory = HERE,
    store: StoreUrl = "",
    mgmtd_store: MgmtdUrl = "",
) -> None:
    """Fill an empty store from a file. The services must be stopped."""
    count = perform(meta_store.load(RealEnv(), _stores(directory, store, mgmtd_store), file))
    say(f"{count} rows loaded")


tree_commands.register(app)
bench_command.register(app)


def main() -> None:
    """Entry point."""
    app()
