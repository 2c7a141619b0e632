"""emberfs:// for fsspec: pandas, pyarrow, DuckDB, dask, torch, ... without a mount.

    fsspec.open("emberfs://host:9400/data/a")
    fsspec.filesystem("emberfs", mgmtd="host:9400", cluster="local")

Blocking on purpose: fsspec refuses asynchronous file systems in forked children. What moves much
at once (cat, cat_ranges, pipe, find) is concurrent inside. Errors are OSErrors of their kind.
"""

import datetime
import errno
import functools
import hashlib
import os
import stat as st
from collections.abc import Sequence
from typing import Any, TypeAlias

from fsspec.spec import AbstractFileSystem
from fsspec.utils import stringify_path

from emberfs.client.ecosystem import bulk
from emberfs.client.ecosystem.locate import SCHEME, locate, split_url
from emberfs.client.ecosystem.session import Session, session
from emberfs.client.ecosystem.streams import (
    READ_BUFFER_BYTES,
    WRITE_BUFFER_BYTES,
    RawFile,
    Reader,
    Writer,
    hidden_beside,
)

Given: TypeAlias = Any  # fsspec does not say more

BIG_BYTES = 8 << 20


class EmberFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """A cluster's tree for fsspec. Paths are absolute; several instances share one connection."""

    protocol = "emberfs"
    root_marker = "/"
    blocksize = BIG_BYTES

    def __init__(
        self,
        mgmtd: str | Sequence[str] | None = None,
        cluster: str | None = None,
        directory: str | None = None,
        auto_mkdir: bool = True,
        **options: Given,
    ) -> None:
        """Name a cluster; the first use connects. See locate.locate for what is not given.

        `auto_mkdir`: writing makes the directories above a file, as object stores seem to.
        """
        super().__init__(**options)
        self.place = locate(mgmtd, cluster, directory)
        self.auto_mkdir = auto_mkdir

    # ------------------------------------------------------------ identity

    @property
    def _session(self) -> Session:
        return session(self.place)

    @property
    def fsid(self) -> str:
        """The same for all clients of one cluster, of no other."""
        return f"emberfs-{self._session.identity:x}"

    def __eq__(self, other: object) -> bool:
        """Instances of threads and processes are equal if they lead to the same cluster."""
        return isinstance(other, EmberFileSystem) and self.place == other.place

    def __hash__(self) -> int:
        """Of the cluster."""
        return hash(self.place)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the cluster that was found: there, the environment may be another."""
        found = {"mgmtd": ",".join(self.place.mgmtd), "cluster": self.place.cluster}
        kept = {k: v for k, v in self.storage_options.items() if k != "directory"}
        return functools.partial(type(self), **{**kept, **found, "auto_mkdir": self.auto_mkdir}), ()

    @classmethod
    def _strip_protocol(cls, path: Given) -> Given:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return split_url(stringify_path(path))[1]

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        host = split_url(stringify_path(path))[0]
        return {"mgmtd": host} if host else {}

    def unstrip_protocol(self, name: str) -> str:
        """A URL that leads to the same place from anywhere."""
        return f"{SCHEME}{','.join(self.place.mgmtd)}{self._strip_protocol(name)}"

    # ------------------------------------------------------------ looking

    def ls(self, path: str, detail: bool = True, **_: object) -> list[Any]:
        """Entries of a directory, or the file itself. FileNotFoundError."""
        fs = self._session
        found = fs.run(bulk.listed(fs, self._strip_protocol(path)))
        return found if detail else [info["name"] for info in found]

    def info(self, path: str, **_: object) -> dict[str, Any]:
        """Attributes: of what a symbolic link leads to, with `islink` and `destination`."""
        fs = self._session
        return fs.run(bulk.info(fs, self._strip_protocol(path)))

    def exists(self, path: str, **_: object) -> bool:
        """Tell whether the path leads to something; errors of another kind are raised."""
        fs = self._session
        return fs.run(fs.files.exists(self._strip_protocol(path)))

    def lexists(self, path: str, **_: object) -> bool:
        """As exists, of a symbolic link itself."""
        fs = self._session
        try:
            fs.run(fs.files.stat(self._strip_protocol(path), follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def islink(self, path: str) -> bool:
        """Tell a symbolic link."""
        fs = self._session
        try:
            found = fs.run(fs.files.stat(self._strip_protocol(path), follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return st.S_ISLNK(found.st_mode)

    def sizes(self, paths: list[str]) -> list[int]:
        """Bytes of each file, in few calls. FileNotFoundError for one that is not there."""
        fs = self._session
        where = self._strip_protocol(list(paths))
        found = fs.run(fs.files.batch_stat(where))
        for path, one in zip(where, found, strict=True):
            if isinstance(one, OSError):
                raise one
            if one is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return [one.st_size for one in found if isinstance(one, os.stat_result)]

    def created(self, path: str) -> datetime.datetime:
        """When the inode changed last, in UTC: when a file was made is not kept."""
        return datetime.datetime.fromtimestamp(self.info(path)["created"], tz=datetime.UTC)

    def modified(self, path: str) -> datetime.datetime:
        """When the content changed last, in UTC."""
        return datetime.datetime.fromtimestamp(self.info(path)["mtime"], tz=datetime.UTC)

    def checksum(self, path: str) -> int:
        """A number that is another one when the content has changed."""
        return int(self.ukey(path)[:16], 16)

    def ukey(self, path: str) -> str:
        """A hash that is another one when the content has changed: of inode, length and times."""
        found = self.info(path)
        keys = ("ino", "size", "mtime_ns", "ctime_ns")
        text = ":".join([self.fsid, *(str(found[key]) for key in keys)])
        return hashlib.sha256(text.encode()).hexdigest()

    def sign(self, path: str, expiration: int = 100, **_: object) -> str:
        """There are no signed URLs."""
        raise NotImplementedError(
            "emberfs has no signed URLs: give the reader the emberfs:// URL, or put a web server "
            "before a mount"
        )

    # ------------------------------------------------------------ reading and writing

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: object = None,
        **_: object,
    ) -> Reader | Writer:
        where = self._strip_protocol(path)
        if mode == "rb":
            return Reader(RawFile(self, where, mode), block_size or READ_BUFFER_BYTES)
        if mode not in ("wb", "ab", "xb"):
            raise ValueError(f"mode {mode!r}: use rb, wb, ab or xb (a mount has r+)")
        if autocommit:
            raw, final = self._made(lambda: RawFile(self, where, mode), where), ""
        elif mode == "ab":
            raise ValueError("appending cannot be part of a transaction: write a new file")
        else:
            if mode == "xb" and self.lexists(where):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), where)
            part, final = hidden_beside(where), where
            raw = self._made(lambda: RawFile(self, part, "xb"), part)
        return Writer(raw, block_size or WRITE_BUFFER_BYTES, final, exclusive=mode == "xb")

    def _made(self, work: Given, path: str) -> Given:
        """Do what makes a name; with auto_mkdir again, after making the directories above it."""
        try:
            return work()
        except FileNotFoundError:
            if not self.auto_mkdir:
                raise
            self.makedirs(self._parent(path), exist_ok=True)
            return work()

    def move_into_place(self, part: str, path: str, flags: int) -> None:
        """Rename what a transaction has written."""
        fs = self._session
        fs.run(fs.files.rename(part, path, flags=flags))

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: object
    ) -> bytes:
        """The bytes from start to end, as slices count."""
        [found] = self._bytes_of([(self._strip_protocol(path), start, end)])
        return bytes(found)

    def cat_ranges(
        self,
        paths: list[str],
        starts: Given,
        ends: Given,
        max_gap: int | None = None,
        on_error: str = "return",
        **_: object,
    ) -> list[Any]:
        """Many ranges at once; each file is opened once. `max_gap`: ranges are never joined."""
        if not isinstance(paths, list):
            raise TypeError(f"paths must be a list, not {type(paths).__name__}")
        first, last = (
            list(ends_) if isinstance(ends_, Sequence) else [ends_] * len(paths)
            for ends_ in (starts, ends)
        )
        if not len(paths) == len(first) == len(last):
            raise ValueError(f"{len(paths)} paths, {len(first)} starts, {len(last)} ends")
        where = self._strip_protocol(paths)
        return self._bytes_of(list(zip(where, first, last, strict=True)), on_error)

    def _bytes_of(self, wanted: list[bulk.Range], on_error: str = "raise") -> list[Any]:
        fs = self._session
        found = fs.run(bulk.ranges(fs, wanted))
        if on_error == "raise":
            for one in found:
                if isinstance(one, OSError):
                    raise one
        return [bytes(one) if isinstance(one, memoryview) else one for one in found]

    def cat(
        self, path: Given, recursive: bool = False, on_error: str = "raise", **options: Given
    ) -> Given:
        """Whole files, many at once: bytes of one path, else a dict."""
        paths = self.expand_path(path, recursive=recursive)
        if len(paths) == 1 and isinstance(path, str) and paths[0] == self._strip_protocol(path):
            return self.cat_file(path, **options)
        fs = self._session
        if recursive:  # directories have no content
            stats = fs.run(fs.files.batch_stat(paths))
            paths = [one for one, found in zip(paths, stats, strict=True) if not _directory(found)]
        start, end = options.get("start"), options.get("end")
        found = self._bytes_of([(one, start, end) for one in paths], on_error)
        pairs = zip(paths, found, strict=True)
        return {p: one for p, one in pairs if on_error != "omit" or isinstance(one, bytes)}

    def pipe_file(self, path: str, value: Given, mode: str = "overwrite", **_: object) -> None:
        """Write a whole file, durably; one of up to 8 KiB in one atomic step.

        `mode` "create": FileExistsError if the name is there.
        """
        self._pipe([(self._strip_protocol(path), value)], exclusive=mode == "create")

    def pipe(self, path: Given, value: Given = None, mode: str = "overwrite", **_: object) -> None:
        """Write a file, or each of a dict {path: bytes}, many at once."""
        items = path if isinstance(path, dict) else {path: value}
        self._pipe(
            [(self._strip_protocol(p), data) for p, data in items.items()],
            exclusive=mode == "create",
        )

    def _pipe(self, items: list[tuple[str, Any]], *, exclusive: bool) -> None:
        fs = self._session
        found = fs.run(fs.files.batch_create(items, exclusive=exclusive))
        pairs = list(zip(items, found, strict=True))
        missing = [item for item, one in pairs if isinstance(one, FileNotFoundError)]
        if missing and self.auto_mkdir:
            for parent in sorted({self._parent(path) for path, _ in missing}):
                self.makedirs(parent, exist_ok=True)
            found = [one for _, one in pairs if not isinstance(one, FileNotFoundError)]
            found += fs.run(fs.files.batch_create(missing, exclusive=exclusive))
        for one in found:
            if one is not None:
                raise one

    def touch(self, path: str, truncate: bool = True, **_: object) -> None:
        """Make an empty file; of one that is there, empty it (`truncate`) or set its times."""
        fs, where = self._session, self._strip_protocol(path)
        self._made(lambda: fs.run(bulk.touch(fs, where, truncate=truncate)), where)

    def cp_file(self, path1: str, path2: str, **_: object) -> None:
        """Copy a file, through this client; of a directory, only make it."""
        fs = self._session
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        if self.isdir(source):
            self.makedirs(target, exist_ok=True)
            return
        if source == target:
            raise bulk.same_file(source, target)
        self._made(lambda: fs.run(bulk.copy(fs, source, target)), target)

    # ------------------------------------------------------------ names

    def mkdir(self, path: str, create_parents: bool = True, **_: object) -> None:
        """Make a directory. FileExistsError."""
        if create_parents:
            return self.makedirs(path)
        fs = self._session
        return fs.run(fs.files.mkdir(self._strip_protocol(path)))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory and what is missing above it."""
        fs = self._session
        fs.run(fs.files.makedirs(self._strip_protocol(path), exist_ok=exist_ok))

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        fs = self._session
        fs.run(fs.files.rmdir(self._strip_protocol(path)))

    def rm_file(self, path: str) -> None:
        """Remove a file."""
        fs = self._session
        fs.run(fs.files.remove(self._strip_protocol(path)))

    _rm = rm_file

    def rm(self, path: Given, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove files; with `recursive` also directories, each in one step whatever its size."""
        fs = self._session
        if maxdepth is not None:
            for one in reversed(self.expand_path(path, recursive=recursive, maxdepth=maxdepth)):
                self.rmdir(one) if self._is_real_directory(one) else self.rm_file(one)
            return
        for one in self.expand_path(path):
            if not self._is_real_directory(one):
                self.rm_file(one)
            elif recursive:
                fs.run(bulk.remove_tree(fs, one))
            else:
                raise IsADirectoryError(errno.EISDIR, "a directory: pass recursive=True", one)

    def _is_real_directory(self, path: str) -> bool:
        fs = self._session
        return st.S_ISDIR(fs.run(fs.files.stat(path, follow_symlinks=False)).st_mode)

    def mv(
        self,
        path1: Given,
        path2: Given,
        recursive: bool = True,
        maxdepth: int | None = None,
        **options: Given,
    ) -> None:
        """Rename, atomically and whatever the size; into `path2` if that is a directory.

        Lists and patterns, and what a quota keeps apart, are copied and removed.
        """
        single = isinstance(path1, str) and isinstance(path2, str)
        if not single or maxdepth is not None or any(c in path1 for c in "*?["):
            super().mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **options)
            return
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        if source == target:
            return
        if path2.endswith("/") or self.isdir(target):
            target = target.rstrip("/") + "/" + source.rpartition("/")[2]
        fs = self._session
        try:
            self._made(lambda: fs.run(fs.files.rename(source, target)), target)
        except OSError as problem:
            if problem.errno != errno.EXDEV:
                raise
            super().mv(source, target, recursive=self.isdir(source))

    def link(self, src: str, dst: str, **_: object) -> None:
        """Make a hard link `dst` to the file `src`."""
        fs = self._session
        fs.run(fs.files.link(self._strip_protocol(src), self._strip_protocol(dst)))

    def symlink(self, src: str, dst: str, **_: object) -> None:
        """Make a symbolic link `dst` that says `src`, which may be relative to it."""
        fs = self._session
        target = self._strip_protocol(src) if src.startswith(SCHEME) else src
        fs.run(fs.files.symlink(target, self._strip_protocol(dst)))

    def chmod(self, path: str, mode: int) -> None:
        """Set the permission bits."""
        fs = self._session
        fs.run(fs.files.chmod(self._strip_protocol(path), mode))


def _directory(found: object) -> bool:
    return isinstance(found, os.stat_result) and st.S_ISDIR(found.st_mode)
