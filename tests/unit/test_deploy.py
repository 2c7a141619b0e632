"""Plans, processes, doctor and the words of status."""

import asyncio
import os
import socket
from pathlib import Path

import msgspec
import pytest

from emberfs.client.fuse import FuseConfig
from emberfs.deploy import doctor, processes
from emberfs.deploy.local_cluster import bring_up
from emberfs.deploy.plan import Plan, load_plan, service_settings, write_plan
from emberfs.deploy.processes import Process
from emberfs.deploy.status import duration, size, target_note
from emberfs.meta.server import MetaConfig
from emberfs.mgmtd.server import MgmtdConfig
from emberfs.proto.cluster import LocalState, PublicState, TargetReport
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import ChainVersion, MiB, TargetId
from emberfs.runtime.config import load_config
from emberfs.runtime.real import RealEnv
from emberfs.storage.server import StorageConfig


def plan_in(tmp_path: Path, **fields: object) -> Plan:
    return Plan(directory=str(tmp_path / "c"), mountpoint=str(tmp_path / 'm "x"'), **fields)


def test_a_plan_comes_back_as_it_was_written(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, base_port=12345, storage_directories=("/a", "/b", "/c"))
    write_plan(plan)
    assert load_plan(tmp_path / "c") == plan
    assert load_plan(tmp_path / "none") is None


def test_every_service_accepts_what_the_plan_writes(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    write_plan(plan)
    types = {"mgmtd": MgmtdConfig, "meta": MetaConfig, "fuse": FuseConfig}
    ports = set()
    for name in [*plan.service_names(), "fuse"]:
        config = load_config(plan.process(name).config, types.get(name, StorageConfig))
        ports.add(config.metrics_port)
    assert len(ports) == 6
    assert service_settings(plan, "storage2")["node"] == 12
    assert service_settings(plan, "storage2")["services_on_disk"] == 3, "they share one disk"


def test_several_metadata_servers_have_names_ids_and_ports_of_their_own(tmp_path: Path) -> None:
    """Who comes later moves nobody else's."""
    one = plan_in(tmp_path, store="etcd://127.0.0.1:2379/x")
    three = msgspec.structs.replace(one, metas=3)
    write_plan(three)
    names = three.service_names()
    assert names == ["mgmtd", "meta", "meta2", "meta3", "storage1", "storage2", "storage3"]
    settings = [service_settings(three, name) for name in ("meta", "meta2", "meta3")]
    assert [one["node"] for one in settings] == [2, 3, 4]
    assert {str(one["store"]) for one in settings} == {three.store}
    assert three.process("meta3").command == "emberfs-meta"
    assert len({three.metrics_port(name) for name in [*names, "fuse"]}) == 8
    for name in [*one.service_names(), "fuse"]:
        assert one.metrics_port(name) == three.metrics_port(name)


def test_samples_are_valid() -> None:
    samples = Path(__file__).resolve().parents[2] / "deploy" / "samples"
    types = {
        "mgmtd": MgmtdConfig,
        "meta": MetaConfig,
        "storage": StorageConfig,
        "fuse": FuseConfig,
    }
    for name, config_type in types.items():
        load_config(samples / f"{name}.toml", config_type)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"replicas": 4}, "4 replicas"),
        ({"directory": "/tmp/" + "x" * 100}, "shorter"),
        ({"metas": 2}, "need one store"),
        ({"metas": 0}, "write 1 to 9"),
        ({"metas": 10, "store": "etcd://127.0.0.1:2379/x"}, "write 1 to 9"),
    ],
)
def test_impossible_plans_are_refused(tmp_path: Path, fields: dict[str, object], says: str) -> None:

    plan = msgspec.structs.replace(plan_in(tmp_path), **fields)
    with pytest.raises(EmberfsError, match=says):
        asyncio.run(bring_up(RealEnv(), plan, print))


def process_in(tmp_path: Path) -> Process:
    return Process("p", "emberfs-nothing", tmp_path / "c", tmp_path / "p.pid", tmp_path / "p.log")


def test_a_pid_of_somebody_else_is_not_ours(tmp_path: Path) -> None:
    process = process_in(tmp_path)
    assert processes.running_pid(process) is None
    process.pid_file.write_text(f"{os.getpid()} 1\n")  # our pid, another start time
    assert processes.running_pid(process) is None
    process.pid_file.write_text("garbage")
    assert processes.running_pid(process) is None


def test_a_missing_command_is_said(tmp_path: Path) -> None:
    with pytest.raises(EmberfsError, match="make install"):
        processes.start(process_in(tmp_path))


def test_failure_quotes_the_last_line(tmp_path: Path) -> None:
    process = process_in(tmp_path)
    assert "wrote nothing" in processes.failure(process)
    process.log_file.write_text("one\nport 1 is taken\n")
    assert "port 1 is taken" in processes.failure(process)


def test_doctor_names_a_taken_port_and_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(doctor, "PACKAGES", ("emberfs-is-not-on-any-index",))
        findings = doctor.examine(RealEnv(), tmp_path / "not" / "yet", [port])
    fatal = {f.subject: f.remedy for f in findings if f.grade == doctor.Grade.FATAL}
    assert "--base-port" in fatal[f"port {port}"]
    assert fatal["emberfs-is-not-on-any-index"] == "make install"
    assert all(f.remedy for f in findings if f.grade != doctor.Grade.FINE)


def test_recovery_is_shown_with_progress() -> None:
    report = TargetReport(TargetId(301), LocalState.ONLINE, ChainVersion(4), 0, 0)
    assert target_note(PublicState.SYNCING, report) == "recovery begins"
    assert target_note(PublicState.SERVING, report) == ""
    running = msgspec.structs.replace(
        report,
        sync_done_bytes=3 * MiB,
        sync_total_bytes=12 * MiB,
        sync_done_chunks=2,
        sync_total_chunks=9,
        sync_bytes_per_s=2 * MiB,
        sync_source=TargetId(101),
    )
    text = "recovery from 101 25 %: 2 of 9 chunks, 3.0 MiB of 12.0 MiB"
    assert target_note(PublicState.SYNCING, running) == f"{text}, 2.0 MiB/s, 5 s left"
    stuck = msgspec.structs.replace(running, sync_bytes_per_s=0, sync_problem="no route")
    assert target_note(PublicState.SYNCING, stuck) == f"{text}, does not advance: no route"
    hurt = msgspec.structs.replace(report, damaged_chunks=2, scrub_findings=3)
    assert "2 damaged chunks" in target_note(PublicState.SERVING, hurt)
    assert [duration(5), duration(150), duration(9000)] == ["5 s", "2 min", "2 h"]


def test_sizes_for_people() -> None:
    assert [size(0), size(1023), size(1536), size(5 << 40)] == [
        "0 B", "1023 B", "1.5 KiB", "5.0 TiB",
    ]  # fmt: skip
