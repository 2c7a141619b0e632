"""The files of a cluster on one host: what runs, where its data lies, and its TOML.

DIRECTORY/
  cluster.toml      what `up` was asked for; later runs read it
  config/NAME.toml  one per service        data/NAME/   kept by `down`
  run/NAME.pid  run/NAME.sock              log/NAME.log
"""

import json
from pathlib import Path

import msgspec

from emberfs.deploy.processes import Process
from emberfs.runtime.config import load_config

MGMTD_NODE = 1
META_NODE = 2  # of the first; the others follow
METAS_MAX = 9
STORAGE_NODE_FIRST = 11
UNIX_PATH_BYTES_MAX = 100  # sun_path is 108; the region socket adds a suffix


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a local cluster consists of."""

    directory: str
    mountpoint: str
    cluster: str = "local"
    base_port: int = 9400  # mgmtd; the metrics ports follow from base_port + 10 on
    storages: int = 3
    replicas: int = 3
    targets_per_storage: int = 3
    chunk_bytes: int = 1 << 20
    store: str = ""  # of mgmtd and meta, shared; empty: each in its own directory
    metas: int = 1  # metadata servers, all on the shared store
    storage_directories: tuple[str, ...] = ()  # instead of DIRECTORY/data/storageN
    durable_close: bool = True  # of the mount: see FuseConfig
    log_level: str = "INFO"

    @property
    def mgmtd_address(self) -> str:
        """Where the control plane answers."""
        return f"127.0.0.1:{self.base_port}"

    def path(self, *parts: str) -> Path:
        """Name a path under the cluster's directory."""
        return Path(self.directory, *parts)

    def storage_names(self) -> list[str]:
        """Names of the storage services."""
        return [f"storage{number + 1}" for number in range(self.storages)]

    def service_names(self) -> list[str]:
        """All services in start order, without the mount."""
        return ["mgmtd", *self.meta_names(), *self.storage_names()]

    def meta_names(self) -> list[str]:
        """Names of the metadata services."""
        return ["meta", *(f"meta{number}" for number in range(2, self.metas + 1))]

    def process(self, name: str) -> Process:
        """Return the process of a service."""
        kind = name.rstrip("0123456789")
        return Process(
            name=name,
            command=f"emberfs-{kind}",
            config=self.path("config", f"{name}.toml"),
            pid_file=self.path("run", f"{name}.pid"),
            log_file=self.path("log", f"{name}.log"),
        )

    def metrics_port(self, name: str) -> int:
        """Each service's Prometheus port."""
        first, *more = self.meta_names()  # who comes later moves nobody else's port
        names = ["mgmtd", first, *self.storage_names(), "fuse", *more]
        return self.base_port + 10 + names.index(name)


def load_plan(directory: Path) -> Plan | None:
    """Return the plan of an earlier `up`, None if there was none."""
    path = directory / "cluster.toml"
    return load_config(path, Plan) if path.exists() else None


def write_plan(plan: Plan) -> None:
    """Lay out the directories and write every TOML file."""
    for name in ("config", "run", "log", "data"):
        plan.path(name).mkdir(parents=True, exist_ok=True)
    fields = {name: getattr(plan, name) for name in plan.__struct_fields__}
    plan.path("cluster.toml").write_text(_toml(fields))
    for name in [*plan.service_names(), "fuse"]:
        plan.process(name).config.write_text(_toml(service_settings(plan, name)))


def service_settings(plan: Plan, name: str) -> dict[str, object]:
    """Return the settings of one service."""
    settings: dict[str, object] = {
        "cluster": plan.cluster,
        "metrics_port": plan.metrics_port(name),
        "log_level": plan.log_level,
    }
    if name == "mgmtd":
        return settings | {
            "node": MGMTD_NODE,
            "listen": plan.mgmtd_address,
            **_state(plan, name),
        }
    settings["mgmtd"] = (plan.mgmtd_address,)
    if name == "fuse":
        return settings | {"mountpoint": plan.mountpoint, "durable_close": plan.durable_close}
    settings["listen"] = (f"shm://{plan.path('run', name + '.sock')}", "tcp://127.0.0.1:0")
    if name in plan.meta_names():
        return settings | {
            "node": META_NODE + plan.meta_names().index(name),
            **_state(plan, name),
            "chunk_bytes": plan.chunk_bytes,
        }
    place = plan.storage_names().index(name)
    directories = plan.storage_directories or [
        str(plan.path("data", storage)) for storage in plan.storage_names()
    ]
    return settings | {
        "node": STORAGE_NODE_FIRST + place,
        "data": directories[place],
        "targets": plan.targets_per_storage,
        "services_on_disk": 1 if plan.storage_directories else plan.storages,
    }


def _state(plan: Plan, name: str) -> dict[str, object]:
    return {"store": plan.store} if plan.store else {"data": str(plan.path("data", name))}


def _toml(table: dict[str, object]) -> str:
    """Strings, numbers, booleans and lists of strings are the same in JSON and TOML."""
    rows = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in table.items())
    return "".join(rows)
