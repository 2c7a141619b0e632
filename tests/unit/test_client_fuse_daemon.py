"""The FUSE daemon as a process: start-up errors, deadlines, stop, death, metrics."""

import errno
import mmap
import os
import subprocess
import sys
import threading
import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from emberfs.client.fuse import FuseConfig, mount_options
from emberfs.client.fuse_metrics import FuseMetrics
from emberfs.client.mountpoint import mount_at
from semantics.mounting import mounted, needs_fuse


def start(tmp_path, **settings) -> subprocess.CompletedProcess:
    config = tmp_path / "fuse.toml"
    table = {"cluster": '"c"', "mgmtd": '["127.0.0.1:1"]', "connect_timeout_s": "0.5"} | settings
    config.write_text("".join(f"{key} = {value}\n" for key, value in table.items()))
    return subprocess.run(
        [sys.executable, "-m", "emberfs.client.fuse", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@needs_fuse
def test_start_on_a_missing_mount_point_is_one_line(tmp_path) -> None:
    done = start(tmp_path, mountpoint=f'"{tmp_path}/none"')
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no such directory" in done.stderr


@needs_fuse
def test_o4_unreachable_cluster_is_named_and_nothing_stays_mounted(tmp_path) -> None:
    """Mounting an unreachable cluster ends in time with the cause; nothing stays mounted."""
    (tmp_path / "m").mkdir()
    done = start(tmp_path, mountpoint=f'"{tmp_path}/m"')
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr.splitlines()[-1]
    assert mount_at(str(tmp_path / "m")) is None


def test_unknown_setting_names_the_nearest(tmp_path) -> None:
    done = start(tmp_path, mountpoint='"/x"', attr_timeout="1.0")
    assert done.returncode == 2
    assert "attr_timeout_s" in done.stderr


def test_options_let_others_in_only_where_root_mounts(monkeypatch) -> None:
    config = FuseConfig(cluster="c", mgmtd=(), mountpoint="/m")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "allow_other" in mount_options(config)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "allow_other" not in mount_options(config)
    assert "default_permissions" in mount_options(config)


@needs_fuse
def test_o15_a_server_that_never_answers_gives_etimedout(tmp_path) -> None:
    """A server that never answers gives applications ETIMEDOUT, not an endless wait."""
    with mounted(tmp_path / "m", "hasty") as daemon:
        begun = time.monotonic()
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                os.stat(daemon.place / "hole")
            assert caught.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - begun < 4
        (daemon.place / "f").write_text("alive")
        assert (daemon.place / "f").read_text() == "alive"
        assert daemon.stop() == 0


@needs_fuse
def test_stuck_requests_do_not_block_others(tmp_path) -> None:
    with mounted(tmp_path / "m", "hasty") as daemon:
        # Each in a directory of its own: the kernel locks the directory that a lookup waits in
        # (pyfuse3 does not ask for FUSE_PARALLEL_DIROPS).
        threads = []
        for index in range(20):
            directory = daemon.place / f"d{index}"
            directory.mkdir()
            threads.append(threading.Thread(target=os.path.exists, args=(directory / "hole",)))
        for thread in threads:
            thread.start()
        begun = time.monotonic()
        (daemon.place / "f").write_text("alive")
        assert time.monotonic() - begun < 0.8
        for thread in threads:
            thread.join()
        assert time.monotonic() - begun < 3  # they waited side by side


@needs_fuse
def test_o15_o4_stop_with_stuck_requests_and_open_files_ends(tmp_path) -> None:
    """The daemon ends in bounded time although requests are stuck and files open."""
    with mounted(tmp_path / "m") as daemon:
        (daemon.place / "f").write_text("x")
        held = os.open(daemon.place / "f", os.O_RDONLY)
        answers = []

        def look() -> None:
            try:
                os.stat(daemon.place / "hole")
            except OSError as problem:
                answers.append(problem.errno)

        thread = threading.Thread(target=look)
        thread.start()
        time.sleep(0.2)
        assert daemon.stop() == 0
        thread.join(timeout=5)
        assert answers
        assert answers[0] in (errno.ECONNABORTED, errno.ENOTCONN, errno.EIO)
        assert mount_at(str(daemon.place)) is None
        with pytest.raises(OSError):
            os.pread(held, 1, 0)
        try:
            os.close(held)
        except OSError as problem:
            assert problem.errno in (errno.ENOTCONN, errno.ECONNABORTED)  # noqa: PT017


@needs_fuse
def test_unmount_from_outside_ends_the_process(tmp_path) -> None:
    with mounted(tmp_path / "m") as daemon:
        subprocess.run(["fusermount3", "-u", str(daemon.place)], check=True, timeout=10)
        assert daemon.wait() == 0


@needs_fuse
def test_stop_writes_back_what_is_mapped(tmp_path) -> None:
    """A dirty page of a mapping reaches the daemon before the mount goes, busy or not."""
    with mounted(tmp_path / "m", "log") as daemon:
        (daemon.place / "f").write_bytes(bytes(8192))
        with (
            open(daemon.place / "f", "r+b") as file,
            mmap.mmap(file.fileno(), 8192) as memory,
        ):
            memory[5000:5005] = b"dirty"
            assert daemon.stop() == 0
            try:
                file.close()
            except OSError as problem:
                assert problem.errno in (errno.ENOTCONN, errno.ECONNABORTED)  # noqa: PT017
        assert "wrote 4096 at 4096" in daemon.finish()


def test_metrics_are_rendered() -> None:
    metrics = FuseMetrics()
    registry = CollectorRegistry()
    registry.register(metrics)
    metrics.operation("read").observe(30_000)
    metrics.operation("read").observe(2_000_000)
    metrics.operation("lookup").observe(1)
    metrics.operation("lookup").failed("ENOENT")
    metrics.read_bytes += 4096
    text = generate_latest(registry).decode()
    assert 'emberfs_fuse_operations_total{operation="read"} 2.0' in text
    assert 'emberfs_fuse_errors_total{errno="ENOENT",operation="lookup"} 1.0' in text
    assert 'emberfs_fuse_latency_seconds_bucket{le="5e-05",operation="read"} 1.0' in text
    assert 'emberfs_fuse_latency_seconds_count{operation="read"} 2.0' in text
    assert "emberfs_fuse_read_bytes_total 4096.0" in text


@needs_fuse
@pytest.mark.parametrize("words", [(), ("real",)], ids=["plain", "acl"])
def test_stop_detaches_a_busy_mount(tmp_path, words) -> None:
    """Also one that libfuse has not mounted itself, as those with ACLs."""
    with mounted(tmp_path / "m", *words) as daemon:
        busy = os.open(daemon.place, os.O_RDONLY)
        try:
            assert daemon.stop() == 0
            assert mount_at(str(daemon.place)) is None
        finally:
            os.close(busy)
