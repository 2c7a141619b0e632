"""The fio engine of rings: built as its users build it, run by fio on a real mount."""

import json
import re
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.harness import LocalCluster, run, wait_until

SCRIPT = Path(__file__).parent.parent.parent / "deploy" / "fio" / "engine" / "build_engine.sh"
NO_SOURCE = 3  # of the script: the headers cannot be had
TIMEOUT_S = 60

Fio = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine, compiled with the headers of the fio that is installed."""
    prefix = tmp_path_factory.mktemp("engine")
    done = run(SCRIPT, prefix, timeout_s=180, check=False)
    if done.returncode == NO_SOURCE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return prefix / "lib" / "emberfs_ring.so"


def command(engine: Path, directory: Path, *options: str) -> list[str]:
    """How fio is called for one job."""
    return [
        "fio", f"--ioengine=external:{engine}", f"--directory={directory}", "--name=job",
        "--randrepeat=0", "--output-format=json", "--verify_state_save=0", *options,
    ]  # fmt: skip


@pytest.fixture
def fio(engine: Path, shared: LocalCluster) -> Fio:
    """Run a job on the mount to its end without an error; the sum of its jobs' figures."""

    def call(*options: str) -> dict[str, Any]:
        before = ring_entries(shared)
        done = run(*command(engine, shared.mount, "--group_reporting", *options))
        job = figures(done.stdout)
        assert job["error"] == 0, done.stderr
        job["by_rings"] = ring_entries(shared) - before
        return job

    return call


def figures(text: str) -> dict[str, Any]:
    """fio's JSON, which other lines may stand before."""
    (job,) = json.loads(text[text.index("{") :])["jobs"]
    return dict(job)


def ring_entries(cluster: LocalCluster) -> int:
    """How many reads and writes the daemon has done for rings."""
    url = f"http://127.0.0.1:{cluster.plan.metrics_port('fuse')}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    found = re.search(r"(?m)^emberfs_client_ring_entries_total (\S+)", text)
    return int(float(found[1])) if found else 0


@contextmanager
def running(arguments: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A fio that runs meanwhile, and is ended with its jobs if the test fails."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


@pytest.mark.parametrize("pattern", ["write", "randwrite"])
@pytest.mark.parametrize("block", ["4k", "1000k"])
def test_what_is_written_is_read_back(fio: Fio, pattern: str, block: str) -> None:
    size = "1m" if block == "4k" else "8m"
    job = fio(
        f"--rw={pattern}", f"--bs={block}", f"--size={size}", "--iodepth=64", "--verify=crc32c"
    )
    assert job["write"]["total_ios"] == job["read"]["total_ios"] > 0
    assert job["by_rings"] == job["write"]["total_ios"] + job["read"]["total_ios"]
    assert job["write"]["short_ios"] == job["read"]["short_ios"] == 0


def test_rings_and_the_mount_see_one_file(fio: Fio, shared: LocalCluster) -> None:
    verify = ("--size=1m", "--bs=4k", "--verify=crc32c", "--verify_fatal=1")
    through_mount = (
        "fio", f"--directory={shared.mount}", "--ioengine=psync", "--verify_state_save=0", *verify,
    )  # fmt: skip
    fio("--rw=randwrite", "--iodepth=16", "--filename=ours", "--do_verify=0", *verify)
    run(*through_mount, "--name=theirs", "--filename=ours", "--rw=read")
    run(*through_mount, "--name=theirs", "--filename=theirs", "--rw=write", "--do_verify=0")
    fio("--rw=randread", "--iodepth=64", "--filename=theirs", *verify)
    place = shared.mount / "theirs"
    with place.open("r+b") as opened:
        opened.seek(300_000)
        opened.write(b"damaged!")
    wrong = [
        *verify,
        "--rw=randread",
        "--iodepth=64",
        "--filename=theirs",
    ]  # else it checks nothing
    with pytest.raises(AssertionError, match=r"verify failed at file .* offset 299008"):
        fio(*wrong)


@pytest.mark.parametrize("thread", ["0", "1"])
def test_several_jobs_of_several_files(fio: Fio, thread: str) -> None:
    job = fio(
        "--rw=randrw", "--bs=4k", "--size=2m", "--nrfiles=2", "--openfiles=1", "--iodepth=8",
        "--numjobs=2", f"--thread={thread}", "--fsync=8", "--verify=crc32c", "--io_size=512k",
    )  # fmt: skip
    assert job["sync"]["total_ios"] >= job["write"]["total_ios"] // 8 - 2
    assert job["sync"]["total_ios"] > 0
    assert job["by_rings"] == job["write"]["total_ios"] + job["read"]["total_ios"]


def test_batches_and_options(fio: Fio) -> None:
    job = fio(
        "--ring_priority=1", "--ring_gather_us=500", "--ring_depth=16", "--rw=randread",
        "--bsrange=512-64k", "--size=4m", "--iodepth=64", "--iodepth_batch_submit=16",
        "--iodepth_batch_complete_min=1", "--iodepth_batch_complete_max=64", "--direct=1",
    )  # fmt: skip
    assert job["by_rings"] == job["read"]["total_ios"]
    assert job["read"]["slat_ns"]["N"] == job["read"]["total_ios"]


def test_bad_options_are_one_clear_error(engine: Path, shared: LocalCluster) -> None:
    for options, said in [
        (["--iodepth=40000", "--bs=4k"], "iodepth up to 32768"),
        (["--iodepth=1", "--bs=2g"], "blocks up to 1073741824 bytes"),
        (["--ring_priority=3", "--bs=4k"], "max"),
        (["--iomem=mmap", "--bs=4k"], "remove iomem="),
    ]:
        arguments = command(engine, shared.mount, "--rw=read", "--size=4g", "--filename=big")
        done = run(*arguments, *options, check=False)
        assert done.returncode != 0
        assert not (shared.mount / "big").exists(), "laid out before it was said"
        assert said in done.stderr + done.stdout, options


def test_a_file_opened_only_to_read(fio: Fio, shared: LocalCluster) -> None:
    (shared.mount / "read-only").write_bytes(bytes(1 << 20))
    job = fio("--rw=randread", "--bs=4k", "--filename=read-only", "--readonly", "--iodepth=64")
    assert job["by_rings"] == job["read"]["total_ios"] == 256


def test_a_storage_service_dies_under_it(engine: Path, fresh: LocalCluster, tmp_path: Path) -> None:
    """Nothing is lost, nothing fails: writes wait for the new chain, reads go elsewhere."""
    arguments = command(
        engine, fresh.mount, "--rw=randwrite", "--bs=4k", "--size=4m", "--iodepth=64",
        "--verify=crc32c", "--verify_fatal=1", "--rate_iops=250",
    )  # fmt: skip
    with running(arguments, tmp_path / "log") as process:
        wait_until(lambda: ring_entries(fresh) > 200, 20)
        fresh.kill("storage2")
        killed_at = ring_entries(fresh)
        assert killed_at < 800
        process.wait(TIMEOUT_S)
    text = (tmp_path / "log").read_text()
    assert process.returncode == 0, text
    job = figures(text)
    assert job["error"] == 0
    assert job["write"]["total_ios"] == job["read"]["total_ios"] == 1024


def test_the_daemon_dies_and_there_is_none(
    engine: Path, shared: LocalCluster, tmp_path: Path
) -> None:
    """An end with an error at once, not a hang; then a mount without rings says so."""
    arguments = command(
        engine, shared.mount, "--rw=randread", "--bs=4k", "--size=4m", "--iodepth=64",
        "--time_based", "--runtime=50",
    )  # fmt: skip
    entries = ring_entries(shared)
    with running(arguments, tmp_path / "log") as process:
        wait_until(lambda: ring_entries(shared) > entries + 100, 20)
        shared.kill("fuse")
        process.wait(20)
    text = (tmp_path / "log").read_text()
    assert process.returncode != 0
    assert "emberfs: waiting for completions: the client daemon is gone" in text, text
    config = shared.plan.process("fuse").config
    config.write_text(config.read_text() + 'rings = ""\n')
    shared.start("fuse")
    wait_until(lambda: is_answering(shared.mount), 20)
    arguments = command(engine, shared.mount, "--rw=read", "--size=1g", "--filename=laid-out")
    done = run(*arguments, check=False)
    assert done.returncode != 0
    assert done.stderr.count("not on an emberfs mount with rings") == 1, done.stderr
    assert "use psync or libaio" in done.stderr
    assert not (shared.mount / "laid-out").exists()


def is_answering(mount: Path) -> bool:
    """Tell whether something is mounted that works."""
    try:
        return mount.is_mount() and bool(list(mount.iterdir()))
    except OSError:
        return False


def test_headers_of_another_fio_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "ioengines.h").touch()
    (source / "FIO-VERSION-GEN").write_text('echo "FIO_VERSION = fio-9.9" > FIO-VERSION-FILE\n')
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    done = run("env", f"FIO_SOURCE={source}", SCRIPT, tmp_path / "prefix", check=False)
    assert done.returncode == NO_SOURCE
    assert "the source is fio-9.9, but fio is" in done.stderr
    assert not (tmp_path / "prefix").exists()
