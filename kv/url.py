"""One setting that says where the metadata lies: `store = "URL"`.

memory:                                nowhere: gone with the process
rocks:///var/lib/emberfs/meta          a directory of this machine
etcd://HOST:PORT,HOST:PORT/NAME        an etcd cluster; NAME keeps clusters of emberfs apart
postgres://USER:PASSWORD@HOST:PORT/DATABASE?table=NAME    and what else libpq knows
fdb:///etc/foundationdb/fdb.cluster?NAME                  a cluster file
"""

from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from emberfs.kv.backend import AwayError, Backend
from emberfs.kv.etcd import EtcdBackend
from emberfs.kv.foundationdb import FoundationBackend
from emberfs.kv.memory import MemoryStore
from emberfs.kv.postgres import PostgresBackend
from emberfs.kv.remote import RemoteEngine
from emberfs.kv.rocks import RocksStore
from emberfs.kv.transaction import Engine as LocalEngine
from emberfs.kv.transactions import Engine
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS
from emberfs.runtime.env import Env

NAME = "emberfs"
RETRY_NS = 200 * MS
FORMS = (
    "rocks:///directory",
    "etcd://host:port,host:port/name",
    "postgres://user@host/database",
    "fdb:///cluster/file?name",
    "memory:",
)


class StoreUrl(NamedTuple):
    """What a URL says."""

    kind: str  # "memory", "rocks", "etcd", "postgres", "fdb"
    endpoints: tuple[str, ...] = ()
    path: str = ""  # of rocks and fdb
    name: str = NAME  # prefix, or table
    address: str = ""  # libpq's

    @property
    def is_shared(self) -> bool:
        """Tell whether several processes may use it at a time."""
        return self.kind not in ("memory", "rocks")


def parse_store(text: str) -> StoreUrl:
    """Read a URL. EmberfsError(CONFIG) says what is wrong and how to write it."""
    try:
        parts = urlsplit(text)
        _ = parts.port if "," not in parts.netloc else None
    except ValueError as problem:
        raise _bad(text, str(problem)) from None
    match parts.scheme:
        case "memory" if not (parts.netloc or parts.path):
            return StoreUrl("memory")
        case "rocks":
            return StoreUrl("rocks", path=_absolute(text, parts.netloc, parts.path))
        case "etcd":
            endpoints = tuple(parts.netloc.split(","))
            for endpoint in endpoints:
                host, _, port = endpoint.rpartition(":")
                if not host or not port.isdigit():
                    raise _bad(text, f'"{endpoint}" is not host:port')
            return StoreUrl("etcd", endpoints, name=parts.path.strip("/") or NAME)
        case "postgres" | "postgresql":
            return _postgres(text)
        case "fdb":
            path = _absolute(text, parts.netloc, parts.path)
            return StoreUrl("fdb", path=path, name=parts.query or NAME)
        case "":
            raise _bad(text, "it begins with no kind of store")
        case kind:
            raise _bad(text, f'"{kind}" is no kind of store')


def _postgres(text: str) -> StoreUrl:
    parts = urlsplit(text)
    if len(parts.path) < 2:
        raise _bad(text, "it names no database")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    table = options.pop("table", NAME)
    address = parts._replace(scheme="postgresql", query=urlencode(options)).geturl()
    return StoreUrl("postgres", name=table, address=address)


def _absolute(text: str, host: str, path: str) -> str:
    if host or not path.startswith("/") or path == "/":
        raise _bad(text, "it names no absolute path: three slashes begin one")
    return unquote(path)


def _bad(text: str, reason: str) -> EmberfsError:
    return EmberfsError(
        Code.CONFIG,
        f'store = "{without_password(text)}": {reason}; write one of {", ".join(FORMS)}',
    )


def without_password(text: str) -> str:
    """Return a URL as people may see it."""
    head, at, tail = text.rpartition("@")
    kind, slashes, user = head.partition("://")
    return f"{kind}{slashes}{user.partition(':')[0]}{at}{tail}" if at else text


async def open_engine(env: Env, text: str, *, timeout_ns: int = 0) -> Engine:
    """Open a store. EmberfsError: CONFIG, as the engine, or UNREACHABLE after `timeout_ns`."""
    url = parse_store(text)
    if url.kind == "memory":
        return LocalEngine(env, MemoryStore())
    if url.kind == "rocks":
        return LocalEngine(env, await env.run_blocking(lambda: RocksStore(url.path)))
    engine = remote_engine(env, url)
    deadline_ns = env.now_ns() + timeout_ns
    while True:
        try:
            await engine.open()
            return engine
        except AwayError:
            if env.now_ns() >= deadline_ns:
                await engine.close()
                raise
        except BaseException:
            await engine.close()
            raise
        await env.sleep_ns(RETRY_NS)


def remote_engine(env: Env, url: StoreUrl) -> RemoteEngine:
    """Make the engine of a shared store; it opens when it is first used."""
    backend: Backend
    match url.kind:
        case "etcd":
            backend = EtcdBackend(env, url.endpoints, url.name.encode() + b"/")
        case "postgres":
            backend = PostgresBackend(env, url.address, url.name)
        case _:
            backend = FoundationBackend(env, url.path, url.name.encode())
    return RemoteEngine(env, backend)
