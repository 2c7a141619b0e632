"""`emberfs quota`, `emberfs rm` and `emberfs trash`."""

import os
import re
import stat
from datetime import datetime
from typing import Annotated

import typer
from rich.table import Table

from emberfs.client.file import FileSystem
from emberfs.client.oserrors import translated
from emberfs.deploy.command import HERE, Directory, fail, file_system, inside, perform, plan_of, say
from emberfs.deploy.plan import Plan
from emberfs.deploy.status import console, size
from emberfs.proto.ids import SECOND
from emberfs.proto.quota_calls import QuotaReport, TrashItem

AMOUNT = re.compile(r"(\d+)\s*([kmgtp]?)(i?b)?", re.IGNORECASE)
AMOUNT_MAX = (1 << 63) - 1

quota = typer.Typer(help="Limits of directories: bytes and files.", no_args_is_help=True)
trash = typer.Typer(help="What `emberfs rm --trash` has put away.", no_args_is_help=True)

Where = Annotated[str, typer.Argument(help="path in the file system, or below the mount point")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(quota, name="quota")
    app.add_typer(trash, name="trash")
    app.command("rm")(remove)


def amount(text: str, thousand: int) -> int:
    """Return what "10G" means; 0 or "none" lifts a limit. Fails the command for anything else."""
    if text.lower() == "none":
        return 0
    found = AMOUNT.fullmatch(text.strip())
    if found is None:
        fail(f"{text!r} is no amount: write a number with K, M, G, T or P behind it, or none")
    value: int = int(found[1]) * thousand ** " kmgtp".index(found[2].lower() or " ")
    if value > AMOUNT_MAX:
        fail(f"{text!r} is more than a limit can be")
    return value


# ---------------------------------------------------------------- quota


@quota.command("set")
def quota_set(
    path: Where,
    bytes_: Annotated[
        str | None, typer.Option("--bytes", help="10G, 512M, ...; none lifts the limit")
    ] = None,
    files: Annotated[
        str | None, typer.Option("--files", help="1M (a million), ...; none lifts the limit")
    ] = None,
    directory: Directory = HERE,
) -> None:
    """Limit what a directory and everything below it may use."""
    if bytes_ is None and files is None:
        fail("nothing to set: pass --bytes, --files or both")
    bytes_max = None if bytes_ is None else amount(bytes_, 1024)
    files_max = None if files is None else amount(files, 1000)
    plan = plan_of(directory)

    async def work() -> tuple[QuotaReport, ...]:
        where = inside(plan, path)
        async with file_system(plan) as fs:
            await fs.set_quota(where, bytes_max=bytes_max, files_max=files_max)
            return await fs.quotas_of(where)

    console().print(_table(perform(work())[:1]))


@quota.command("show")
def quota_show(path: Where, directory: Directory = HERE) -> None:
    """Show the quotas that a path counts for, the innermost first."""
    plan = plan_of(directory)

    async def work() -> tuple[QuotaReport, ...]:
        async with file_system(plan) as fs:
            return await fs.quotas_of(inside(plan, path))

    reports = perform(work())
    if reports:
        console().print(_table(reports))
    else:
        say(f"{path} is under no quota")


@quota.command("list")
def quota_list(directory: Directory = HERE) -> None:
    """Show all quotas, and those that are being removed."""
    plan = plan_of(directory)

    async def work() -> list[QuotaReport]:
        async with file_system(plan) as fs:
            with translated():
                return [report async for report in fs.administration.quotas()]

    console().print(_table(perform(work())))


@quota.command("remove")
def quota_remove(path: Where, directory: Directory = HERE) -> None:
    """Lift the quota of a directory."""
    plan = plan_of(directory)

    async def work() -> None:
        async with file_system(plan) as fs:
            await fs.remove_quota(inside(plan, path))

    perform(work())


def _table(reports: list[QuotaReport] | tuple[QuotaReport, ...]) -> Table:
    table = Table("directory", "bytes used", "limit", "files used", "limit", "state")
    for report in reports:
        table.add_row(
            os.fsdecode(report.path) or f"(removed, inode {report.directory})",
            size(report.bytes_used),
            size(report.bytes_max) if report.bytes_max else "-",
            str(report.files_used),
            str(report.files_max) if report.files_max else "-",
            _state(report),
        )
    return table


def _state(report: QuotaReport) -> str:
    if report.state == "active":
        return "active"
    return f"{report.state}: {report.walked} names done, {report.waiting} directories to go"


# ---------------------------------------------------------------- rm


def remove(
    paths: Annotated[list[str], typer.Argument(help="paths in the file system or the mount")],
    recursive: Annotated[
        bool, typer.Option("-r", "--recursive", help="directories with everything in them")
    ] = False,
    to_trash: Annotated[
        bool, typer.Option("--trash", help="into the trash, from where it can be restored")
    ] = False,
    directory: Directory = HERE,
) -> None:
    """Remove files, with -r whole trees in one step each: the servers do the rest afterwards."""
    plan = plan_of(directory)

    async def work() -> None:
        async with file_system(plan) as fs:
            for path in paths:
                await _remove(fs, inside(plan, path), recursive=recursive, to_trash=to_trash)

    perform(work())


async def _remove(fs: FileSystem, path: bytes, *, recursive: bool, to_trash: bool) -> None:
    if to_trash:
        await fs.trash(path)
    elif recursive:
        await fs.remove_tree(path)
    else:
        await fs.remove(path)


# ---------------------------------------------------------------- trash


@trash.command("list")
def trash_list(directory: Directory = HERE) -> None:
    """Show what you have in the trash (uid 0: what anybody has), oldest first."""
    table = Table("id", "since", "uid", "was")
    for item in _items(plan_of(directory)):
        since = datetime.fromtimestamp(item.time_ns / SECOND).isoformat(" ", "seconds")
        slash = "/" if stat.S_ISDIR(item.mode) else ""
        table.add_row(str(item.id), since, str(item.uid), os.fsdecode(item.path) + slash)
    console().print(table)


@trash.command("restore")
def trash_restore(
    what: Annotated[str, typer.Argument(help="id from the list, or the old path (its last one)")],
    directory: Directory = HERE,
) -> None:
    """Put something back where it was."""
    plan = plan_of(directory)
    item = _chosen(plan, what)

    async def work() -> None:
        async with file_system(plan) as fs:
            with translated(item.path):
                await fs.administration.restore(item)

    perform(work())
    say(f"restored {os.fsdecode(item.path)}")


@trash.command("empty")
def trash_empty(
    what: Annotated[str, typer.Argument(help="id or old path; nothing: all of it")] = "",
    directory: Directory = HERE,
) -> None:
    """Remove one thing, or all that you have in the trash, for good."""
    plan = plan_of(directory)
    items = [_chosen(plan, what)] if what else _items(plan)

    async def work() -> None:
        async with file_system(plan) as fs:
            for item in items:
                with translated(item.path):
                    await fs.administration.remove_trashed(item)

    perform(work())
    say(f"removed {len(items)} from the trash")


def _items(plan: Plan) -> list[TrashItem]:
    async def work() -> list[TrashItem]:
        async with file_system(plan) as fs:
            with translated():
                return [item async for item in fs.administration.trashed()]

    return perform(work())


def _chosen(plan: Plan, what: str) -> TrashItem:
    items = _items(plan)
    path = inside(plan, what)
    found = [item for item in items if str(item.id) == what or item.path == path]
    if not found:
        fail(f"{what} is not in your trash: `emberfs trash list` shows what is")
    return found[-1]
