"""fsspec's view of a cluster: `emberfs://HOST:PORT/path`, without a mount.

    import fsspec
    with fsspec.open("emberfs://127.0.0.1:9400/set/a.parquet", "rb") as file: ...

pandas, pyarrow, DuckDB, Dask, torch.distributed.checkpoint and Ray take such URLs, or the file
system object. Options: mgmtd ("host:port", several with commas), cluster (name, default "local"),
both also from EMBERFS_MGMTD and EMBERFS_CLUSTER. Errors are OSErrors with errno.
"""

import os
import secrets
import stat
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

from fsspec.spec import AbstractFileSystem

from emberfs.client.blocking import BlockingFile, Client
from emberfs.client.ecosystem import clusterurl
from emberfs.client.ecosystem.rawfile import buffered
from emberfs.proto.ids import MiB

BUFFER_BYTES = 4 * MiB  # of a file that is opened
_OPEN_AT_ONCE = 64  # files of one cat_ranges
_connected_pid = 0  # the process that has connected, to whatever cluster; children inherit it


class EmberFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Any number of threads may use it. What is pickled, or used first after a fork, connects anew.

    gRPC does not survive a fork: a child of a process that has connected cannot (RuntimeError).
    """

    protocol = clusterurl.SCHEME
    root_marker = "/"
    cachable = True

    def __init__(
        self,
        mgmtd: str | None = None,
        cluster: str | None = None,
        *,
        auto_mkdir: bool = True,
        **options: Any,
    ) -> None:
        """Connects at the first use. `auto_mkdir`: files are written where no directory is yet."""
        super().__init__(**options)
        self._addresses = clusterurl.address(mgmtd)
        self._cluster = clusterurl.cluster_name(cluster)
        self._auto_mkdir = auto_mkdir
        self._lock = threading.Lock()
        self._client: Client | None = None

    @property
    def fsid(self) -> str:
        """Names the cluster."""
        return f"emberfs-{self._addresses[0]}-{self._cluster}"

    @property
    def client(self) -> Client:
        """The connection of this process."""
        if self._client is None or _connected_pid != os.getpid():
            self._connect()
        assert self._client is not None
        return self._client

    def _connect(self) -> None:
        global _connected_pid
        if _connected_pid not in (0, os.getpid()):
            raise RuntimeError(
                "this process was forked from one that is connected to emberfs, and gRPC does not "
                "survive that: start workers with spawn or forkserver, or connect in them first"
            )
        with self._lock:
            if self._client is None:
                _connected_pid = os.getpid()
                self._client = Client(self._addresses, cluster=self._cluster)

    def close(self) -> None:
        """Disconnect; the next use connects again."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None and _connected_pid == os.getpid():
            client.close()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return clusterurl.path_of(os.fspath(path))

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        return clusterurl.options_of(path)

    # ------------------------------------------------------------ what is there

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Attributes of a file or directory; a link's are those of what it leads to."""
        where = self._strip_protocol(path)
        found = self.client.stat(where, follow_symlinks=False)
        return self._described(where, found)

    def _described(self, path: str, found: os.stat_result) -> dict[str, Any]:
        link = stat.S_ISLNK(found.st_mode)
        if link:
            try:
                found = self.client.stat(path)
            except OSError:
                pass  # it leads nowhere
        if stat.S_ISDIR(found.st_mode):
            kind = "directory"
        elif stat.S_ISREG(found.st_mode):
            kind = "file"
        else:
            kind = "link" if link else "other"
        return {
            "name": path,
            "size": 0 if kind == "directory" else found.st_size,
            "type": kind,
            "mode": found.st_mode,
            "uid": found.st_uid,
            "gid": found.st_gid,
            "ino": found.st_ino,
            "nlink": found.st_nlink,
            "created": found.st_ctime,
            "mtime": found.st_mtime,
            "mtime_ns": found.st_mtime_ns,
            "islink": link,
        }

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What is in a directory, sorted; of a file itself."""
        where = self._strip_protocol(path)
        about = self.info(where)
        if about["type"] != "directory":
            return [about] if detail else [where]
        prefix = where.rstrip("/")
        names = sorted(f"{prefix}/{name}" for name in self.client.listdir(where))
        if not detail:
            return names
        every = self.client.batch_stat(names, follow_symlinks=False)
        found = []
        for name, one in zip(names, every, strict=True):
            if isinstance(one, OSError):
                raise one
            if one is not None:  # it has not vanished meanwhile
                found.append(self._described(name, one))
        return found

    def exists(self, path: str, **_: Any) -> bool:
        """True if the path leads to something."""
        return self.client.exists(self._strip_protocol(path))

    def created(self, path: str) -> datetime:
        """When the attributes changed last: no file system of this kind knows more."""
        return datetime.fromtimestamp(self.info(path)["created"], UTC)

    def modified(self, path: str) -> datetime:
        """When the content changed last."""
        return datetime.fromtimestamp(self.info(path)["mtime"], UTC)

    def ukey(self, path: str) -> str:
        """Another one when the content is another."""
        about = self.info(path)
        return f"{about['ino']}-{about['mtime_ns']}-{about['size']}"

    def checksum(self, path: str) -> int:
        """A number that is another one when the content is another."""
        return int.from_bytes(blake2b(self.ukey(path).encode(), digest_size=8).digest(), "big")

    # ------------------------------------------------------------ names

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Make a directory. FileExistsError if something is there."""
        where = self._strip_protocol(path)
        if create_parents:
            self.makedirs(self._parent(where), exist_ok=True)
        self.client.mkdir(where)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory and what is missing above it."""
        where = self._strip_protocol(path)
        if where != "/":
            self.client.makedirs(where, exist_ok=exist_ok)
        elif not exist_ok:
            raise FileExistsError(17, "the root is there", "/")

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        self.client.rmdir(self._strip_protocol(path))

    def rm_file(self, path: str) -> None:
        """Remove a file."""
        self.client.remove(self._strip_protocol(path))

    def _rm(self, path: str) -> None:
        where = self._strip_protocol(path)
        if self.isdir(where):
            self.client.rmdir(where)
        else:
            self.client.remove(where)

    def rm(
        self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None
    ) -> None:
        """Remove; a whole tree goes in one step for the caller."""
        paths = path if isinstance(path, list) else [path]
        if recursive and maxdepth is None and not any(map(_has_magic, paths)):
            for one in map(self._strip_protocol, paths):
                if self.isdir(one):
                    self.client.remove_tree(one)
                else:
                    self.client.remove(one)
            return
        super().rm(path, recursive=recursive, maxdepth=maxdepth)

    def mv(
        self,
        path1: Any,
        path2: Any,
        recursive: bool = False,
        maxdepth: int | None = None,
        **options: Any,
    ) -> None:
        """Rename in one step where that is what is asked for; into a directory if that is there."""
        plain = isinstance(path1, str) and isinstance(path2, str) and not _has_magic(path1)
        if not plain or maxdepth is not None:
            super().mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **options)
            return
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        if self.isdir(target):
            target = f"{target.rstrip('/')}/{source.rsplit('/', 1)[1]}"
        elif self._auto_mkdir:
            self.makedirs(self._parent(target), exist_ok=True)
        self.client.rename(source, target)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copy one file; of a directory, make one."""
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        if self.isdir(source):
            self.makedirs(target, exist_ok=True)
            return
        region = self.client.allocate(BUFFER_BYTES)
        try:
            with self.client.open(source) as read, self._opened(target, "w") as write:
                while count := read.readinto(region.slice(0, BUFFER_BYTES)):
                    write.write(region.slice(0, count))
        finally:
            region.close()

    def touch(self, path: str, truncate: bool = True, **_: Any) -> None:
        """Make an empty file; without `truncate` only the times of one that is there change."""
        where = self._strip_protocol(path)
        if not truncate and self.exists(where):
            self.client.utime(where)
        else:
            self._opened(where, "w").close()

    # ------------------------------------------------------------ contents

    def _opened(self, path: str, mode: str) -> BlockingFile:
        if self._auto_mkdir and mode[0] in "wax":
            try:
                return self.client.open(path, mode)
            except FileNotFoundError:
                self.makedirs(self._parent(path), exist_ok=True)
        return self.client.open(path, mode)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Any = None,
        **_: Any,
    ) -> Any:
        """A buffered file. Not `autocommit`: it gets its name by commit()."""
        where = self._strip_protocol(path)
        kind = mode.replace("b", "").replace("t", "")
        size_bytes = block_size or BUFFER_BYTES
        if autocommit or kind not in ("w", "x"):
            return buffered(self._opened(where, kind), kind, size_bytes, pending=False)
        hidden = f"{self._parent(where).rstrip('/')}/.{secrets.token_hex(8)}.pending"
        file = buffered(self._opened(hidden, "x"), "x", size_bytes, pending=True)
        file.attach(lambda: self.client.rename(hidden, where), lambda: self.client.remove(hidden))
        return file

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """Content from `start` to `end`, both counted from the end if negative."""
        with self.client.open(self._strip_protocol(path)) as file:
            first, count = _bounds(start, end, file)
            content = bytearray(count)
            got = file.pread(content, first) if count else 0
            return bytes(memoryview(content)[:got])

    def cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **_: Any,
    ) -> list[Any]:
        """Ranges of many files, in few calls of the storage services."""
        count = len(paths)
        firsts = starts if isinstance(starts, list) else [starts] * count
        stops = ends if isinstance(ends, list) else [ends] * count
        if len(firsts) != count or len(stops) != count:
            raise ValueError("paths, starts and ends have different lengths")
        found: list[Any] = [None] * count
        places: dict[str, list[int]] = {}
        for place, path in enumerate(paths):
            places.setdefault(self._strip_protocol(path), []).append(place)
        names = list(places)
        for at in range(0, len(names), _OPEN_AT_ONCE):
            some = {name: places[name] for name in names[at : at + _OPEN_AT_ONCE]}
            self._read_ranges(some, firsts, stops, found)
        if on_error == "raise":
            for one in found:
                if isinstance(one, Exception):
                    raise one
        return found

    def _read_ranges(
        self,
        places: dict[str, list[int]],
        starts: Sequence[int | None],
        ends: Sequence[int | None],
        found: list[Any],
    ) -> None:
        files: list[BlockingFile] = []
        wanted: list[tuple[int, BlockingFile, int, bytearray]] = []
        try:
            for path, mine in places.items():
                try:
                    file = self.client.open(path)
                    files.append(file)
                    for place in mine:
                        first, count = _bounds(starts[place], ends[place], file)
                        wanted.append((place, file, first, bytearray(count)))
                except OSError as problem:
                    for place in mine:
                        found[place] = problem
            results = self.client.read_many([(f, at, memory) for _, f, at, memory in wanted])
            for (place, _, _, memory), result in zip(wanted, results, strict=True):
                if isinstance(result, OSError):
                    found[place] = result
                else:
                    found[place] = bytes(memoryview(memory)[:result])
        finally:
            for file in files:
                file.close()

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **_: Any) -> None:
        """Write a whole file. Mode "create": FileExistsError if there is one."""
        with self._opened(self._strip_protocol(path), "x" if mode == "create" else "w") as file:
            file.write(value)


def _has_magic(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _bounds(start: int | None, end: int | None, file: BlockingFile) -> tuple[int, int]:
    """(first byte, count) of a slice; the file's length is asked for only where it matters."""
    first = start or 0
    if end is None or end < 0 or first < 0:
        first, stop, _ = slice(start, end).indices(file.stat().st_size)
    else:
        stop = end
    return first, max(0, stop - first)
