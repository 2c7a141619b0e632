"""Whole clusters on shared stores: real processes, a real mount, real etcd and PostgreSQL."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.harness import BIN, LocalCluster, local_cluster, run, wait_until
from kv_servers import Etcd, Postgres, free_ports


@pytest.fixture(scope="module")
def etcd() -> Iterator[Etcd]:
    cluster = Etcd(3)
    yield cluster
    cluster.stop()


def write_tree(place: Path) -> None:
    (place / "a").mkdir()
    for i in range(30):
        (place / "a" / f"f{i}").write_text(f"text {i}")
    (place / "a" / "f7").rename(place / "a" / "g7")
    (place / "a" / "f8").unlink()


def check_tree(place: Path) -> None:
    names = {f"f{i}" for i in range(30)} - {"f7", "f8"} | {"g7"}
    assert {path.name for path in (place / "a").iterdir()} == names
    for name in names:
        assert (place / "a" / name).read_text() == f"text {name[1:]}"


def test_r9_a_cluster_on_etcd_whose_meta_is_killed(etcd: Etcd, unstarted: LocalCluster) -> None:
    """On a shared store the next metadata server takes over, and a second one is refused."""
    cluster, url = unstarted, f"etcd://{etcd.hosts}/killed"
    cluster.up("--store", url)
    write_tree(cluster.mount)
    cluster.kill("meta")
    cluster.start("meta")
    check_tree(cluster.mount)  # waits for the new one
    cluster.kill("mgmtd")
    cluster.start("mgmtd")
    (cluster.mount / "a" / "after").write_text("x")
    (cluster.mount / "a" / "after").unlink()

    cluster.emberfs("down")
    cluster.up()
    check_tree(cluster.mount)
    cluster.fsck()
    assert cluster.emberfs("clean-data", check=False).returncode == 1  # it runs
    cluster.emberfs("down")
    cluster.emberfs("clean-data")
    cluster.up("--store", url)
    assert list(cluster.mount.iterdir()) == []
    (cluster.mount / "new").write_text("x")


def test_r11_two_mgmtd_on_different_stores_are_refused(etcd: Etcd, unstarted: LocalCluster) -> None:
    """A mgmtd whose store is not that of its peer that leads ends with an error that says so."""
    cluster = unstarted
    cluster.up("--no-mount", "--store", f"etcd://{etcd.hosts}/right")
    (port,) = free_ports(1)
    config = cluster.directory / "config" / "second.toml"

    def write(name: str) -> None:
        config.write_text(
            f'cluster = "{cluster.plan.cluster}"\nnode = 9\nlisten = "127.0.0.1:{port}"\n'
            f'store = "etcd://{etcd.hosts}/{name}"\npeers = ["{cluster.plan.mgmtd_address}"]\n'
        )

    write("wrong")
    done = run(BIN / "emberfs-mgmtd", "--config", config, check=False, timeout_s=30)
    assert done.returncode == 1
    assert "leads on another store" in done.stderr
    assert 'need the same "store"' in done.stderr
    write("right")
    with subprocess.Popen(
        [BIN / "emberfs-mgmtd", "--config", config], stderr=subprocess.PIPE, text=True
    ) as second:
        try:
            assert second.stderr is not None
            assert any("is up" in line for line in second.stderr)
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(4)  # it stays, as a standby
        finally:
            second.terminate()
    cluster.wait_serving()


def test_metadata_moves_from_rocks_to_etcd_to_postgres_and_back(
    etcd: Etcd, unstarted: LocalCluster, tmp_path: Path
) -> None:
    cluster, server = unstarted, Postgres()
    try:
        cluster.up()
        write_tree(cluster.mount)
        stores = ("", f"etcd://{etcd.hosts}/moved", server.url, "")
        for number, target in enumerate(stores[1:]):
            cluster.emberfs("down")
            file = tmp_path / f"dump{number}"
            assert (
                "rows" in run(BIN / "emberfs", "meta", "dump", file, "-d", cluster.directory).stdout
            )
            path = cluster.directory / "cluster.toml"
            lines = [
                line for line in path.read_text().splitlines() if not line.startswith("store ")
            ]
            path.write_text("\n".join([*lines, f'store = "{target}"']) + "\n")
            if not target:
                cluster.directory.joinpath("data", "meta").rename(tmp_path / "old meta")
                cluster.directory.joinpath("data", "mgmtd").rename(tmp_path / "old mgmtd")
            run(BIN / "emberfs", "meta", "load", file, "-d", cluster.directory)
            again = run(BIN / "emberfs", "meta", "load", file, "-d", cluster.directory, check=False)
            assert again.returncode == 1
            assert "not empty" in again.stderr
            cluster.up()
            check_tree(cluster.mount)
            cluster.fsck()
        with local_cluster() as wrong:
            done = wrong.emberfs("up", "--store", "rocks:///x", check=False)
            assert "must be etcd://" in done.stderr
    finally:
        server.stop()


def test_r9_postgres_restarts_under_a_mount(unstarted: LocalCluster) -> None:
    """PostgreSQL crashes and returns under a mounted cluster; the mount goes on."""
    server = Postgres()
    try:
        unstarted.up("--store", server.url)
        write_tree(unstarted.mount)
        server.kill()
        server.start()
        check_tree(unstarted.mount)
        wait_until(lambda: "serving" in unstarted.status(), 20)
        (unstarted.mount / "after").write_text("x")
    finally:
        server.stop()
