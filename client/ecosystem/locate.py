"""Which cluster is meant: options, a URL, the environment, or what `emberfs up` has left here."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from emberfs.client.oserrors import os_error
from emberfs.proto.errors import Code, EmberfsError

SCHEME = "emberfs://"
CLUSTER = "local"  # as `emberfs up` names one
HERE = ".emberfs"  # where `emberfs up` keeps it
HELP = (
    'give mgmtd="host:port", or a URL emberfs://host:port/path, or set EMBERFS_MGMTD, or '
    'directory="..." (EMBERFS_DIRECTORY) of a cluster that `emberfs up` has made'
)


class Place(NamedTuple):
    """A cluster."""

    mgmtd: tuple[str, ...]  # "host:port" each
    cluster: str


class _Local(msgspec.Struct):
    """What counts here of the cluster.toml that `emberfs up` writes."""

    base_port: int
    cluster: str = CLUSTER


def locate(
    mgmtd: str | Sequence[str] | None = None,
    cluster: str | None = None,
    directory: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Place:
    """Find the cluster. The first that is there counts: arguments, environment, ./.emberfs.

    `mgmtd` is one "host:port", several with commas between them, or a sequence. OSError (EINVAL)
    says what to give if nothing is found.
    """
    name = cluster or environ.get("EMBERFS_CLUSTER") or None
    wanted: str | Sequence[str] = mgmtd or ""
    if not wanted and directory is None:
        wanted = environ.get("EMBERFS_MGMTD", "")
    if wanted:
        addresses = wanted.split(",") if isinstance(wanted, str) else wanted
        return Place(tuple(_address(one) for one in addresses), name or CLUSTER)
    path = Path(directory or environ.get("EMBERFS_DIRECTORY") or HERE, "cluster.toml").absolute()
    local = _read(path)
    return Place((f"127.0.0.1:{local.base_port}",), name or local.cluster)


def split_url(path: str) -> tuple[str, str]:
    """Part a path into ("host:port,..." or "", absolute path). ValueError for a wrong URL."""
    if not path.startswith(SCHEME):
        return "", "/" + path.strip("/")
    host, _, rest = path.removeprefix(SCHEME).partition("/")
    if host:
        try:
            host = ",".join(_address(one) for one in host.split(","))
        except OSError:
            text = f"write emberfs:///{host}... for a path, emberfs://host:port/path with a host"
            raise ValueError(f"{path}: {text}") from None
    return host, "/" + rest.strip("/")


def _address(text: str) -> str:
    host, _, port = text.strip().rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise _unusable(f'"{text}" is no address of a management service; {HELP}')
    return f"{host}:{port}"


def _read(path: Path) -> _Local:
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), _Local)
    except FileNotFoundError:
        raise _unusable(f"no cluster is named and {path} is not there; {HELP}") from None
    except (OSError, ValueError, msgspec.ValidationError) as problem:
        raise _unusable(f"{path} cannot be used: {problem}; {HELP}") from None


def _unusable(text: str) -> OSError:
    return os_error(EmberfsError(Code.CONFIG, text))
