"""What the fsspec file system does on the event loop, as one coroutine per call."""

import asyncio
import os
import shutil
import stat as st
from collections.abc import Sequence
from typing import Any, TypeAlias

from emberfs.client.ecosystem.reads import fetch
from emberfs.client.ecosystem.session import Session
from emberfs.client.ecosystem.streams import open_sized
from emberfs.client.file import File, stat_of
from emberfs.client.oserrors import FileSystemError

Range: TypeAlias = tuple[str, int | None, int | None]  # path, start, end as slices count

OPEN_AT_ONCE = 64
COPY_BYTES = 8 << 20


def described(name: str, found: os.stat_result, link: str | None = None) -> dict[str, Any]:
    """What fsspec calls info. Times in seconds since 1970; there is no time of birth."""
    kind = "other"
    if st.S_ISDIR(found.st_mode):
        kind = "directory"
    elif st.S_ISREG(found.st_mode):
        kind = "file"
    info: dict[str, Any] = {
        "name": name,
        "size": found.st_size,
        "type": kind,
        "created": found.st_ctime,
        "islink": link is not None,
        "mode": found.st_mode,
        "uid": found.st_uid,
        "gid": found.st_gid,
        "mtime": found.st_mtime,
        "ino": found.st_ino,
        "nlink": found.st_nlink,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }
    if link is not None:
        info["destination"] = link
    return info


async def info(fs: Session, path: str) -> dict[str, Any]:
    """Attributes of what a path leads to."""
    found = await fs.files.stat(path, follow_symlinks=False)
    if not st.S_ISLNK(found.st_mode):
        return described(path, found)
    return described(path, await fs.files.stat(path), await fs.files.readlink(path))


async def listed(fs: Session, path: str) -> list[dict[str, Any]]:
    """All entries of a directory; a file lists itself.

    A link to a file counts as a file. One to a directory is "other": whoever walks must not go
    in circles.
    """
    infos: list[dict[str, Any]] = []
    links: list[tuple[int, str]] = []
    try:
        async for entry in fs.files.scandir(path):
            if entry.inode is None:
                continue  # it vanished meanwhile
            name = path.rstrip("/") + "/" + entry.name
            found = stat_of(entry.inode)
            if entry.is_symlink():
                links.append((len(infos), os.fsdecode(entry.inode.symlink)))
            infos.append(described(name, found))
    except NotADirectoryError:
        return [await info(fs, path)]
    if links:
        behind = await fs.files.batch_stat([infos[place]["name"] for place, _ in links])
        for (place, target), found_there in zip(links, behind, strict=True):
            name = infos[place]["name"]
            infos[place] |= {"islink": True, "destination": target, "size": 0}
            if isinstance(found_there, os.stat_result):
                infos[place] = described(name, found_there, target)
                if infos[place]["type"] == "directory":
                    infos[place]["type"] = "other"
    return infos


async def ranges(fs: Session, wanted: Sequence[Range]) -> list[memoryview | OSError]:
    """Read ranges of files, every file opened once, all at once."""
    files: dict[str, tuple[File, int] | OSError] = {}
    paths = iter(dict.fromkeys(path for path, _, _ in wanted))

    async def open_each() -> None:
        for path in paths:
            try:
                files[path] = await open_sized(fs, path, "rb")
            except OSError as problem:
                files[path] = problem

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(OPEN_AT_ONCE, len(wanted))):
                group.create_task(open_each())
        found: list[memoryview | OSError] = [memoryview(b"")] * len(wanted)
        reads = []
        for place, (path, start, end) in enumerate(wanted):
            opened = files[path]
            if isinstance(opened, OSError):
                found[place] = opened
                continue
            first, stop, _ = slice(start, end).indices(opened[1])
            if first < stop:
                reads.append((place, (opened[0], first, stop - first)))
        results = await fetch(fs, [read for _, read in reads])
        for (place, _), result in zip(reads, results, strict=True):
            found[place] = result
        return found
    finally:
        opened_files = [one[0] for one in files.values() if not isinstance(one, OSError)]
        await asyncio.gather(*(file.close() for file in opened_files))


async def touch(fs: Session, path: str, *, truncate: bool) -> None:
    """Make an empty file, or empty one, or set its times."""
    try:
        await (await fs.files.open(path, "x")).close()
    except FileExistsError:
        if truncate:
            await fs.files.truncate(path, 0)
        await fs.files.utime(path)


def same_file(source: str, target: str) -> OSError:
    """The error of copying a file onto itself, which would empty it."""
    return shutil.SameFileError(f"{source} and {target} are the same file")


async def copy(fs: Session, source: str, target: str) -> None:
    """Copy the bytes of a file. One part is read while the one before is written."""
    async with await fs.files.open(source, "r") as old:
        size = (await old.stat()).st_size
        try:
            same = (await fs.files.stat(target)).st_ino == (await old.stat()).st_ino
        except FileNotFoundError:
            same = False
        if same:
            raise same_file(source, target)
        async with await fs.files.open(target, "w") as new:
            offset = 0
            while offset < size:
                [part] = await fetch(fs, [(old, offset, min(COPY_BYTES, size - offset))])
                if isinstance(part, FileSystemError):
                    raise part
                if not part:
                    break
                await new.pwrite(part, offset)
                offset += len(part)


async def remove_tree(fs: Session, path: str) -> None:
    """Remove a directory with everything in it: in one step, if its rights allow that."""
    try:
        await fs.files.remove_tree(path)
    except PermissionError:
        await fs.files.rmtree(path)
