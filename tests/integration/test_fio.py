"""fio verifies what it wrote through a real mount, by every engine and option that people use.

The jobs are small: they ask whether every byte is as written, not how fast. docs/fio.md says how
the options behave; bench/bench_fio.py measures.
"""

import json
import subprocess
import time
from pathlib import Path
from zlib import crc32

import pytest

from integration.harness import LocalCluster, run

JOB_TIMEOUT_S = 40
VERIFY: dict[str, object] = {
    "verify": "crc32c",
    "do_verify": 1,
    "verify_fatal": 1,
    "verify_state_save": 0,
}

# (engine, direct, block, pattern, size); the asynchronous engines keep 16 requests in flight.
ENGINES = [
    ("psync", 0, "4k", "randrw", "1m"),
    ("psync", 1, "4k", "randwrite", "512k"),
    ("psync", 0, "4m", "write", "16m"),
    ("sync", 0, "64k", "randwrite", "8m"),
    ("sync", 1, "1m", "write", "16m"),
    ("libaio", 0, "16k", "randrw", "4m"),
    ("libaio", 1, "4k", "randwrite", "1m"),
    ("libaio", 1, "4m", "randwrite", "16m"),
    ("io_uring", 0, "64k", "randwrite", "8m"),
    ("io_uring", 1, "4k", "randrw", "1m"),
    ("io_uring", 1, "1m", "randwrite", "16m"),
    ("mmap", 0, "4k", "randwrite", "1m"),
    ("mmap", 0, "1m", "randrw", "8m"),
]
ASYNCHRONOUS = ("libaio", "io_uring")

# What is changed in a job of random writes of 16 KiB to a file of 1 MiB.
OPTIONS: dict[str, dict[str, object]] = {
    "four jobs, a file each": {"numjobs": 4, "size": "512k"},
    "four jobs in one file": {"numjobs": 4, "filename": "one", "offset_increment": "1m"},
    "four jobs in one file, direct and deep": {
        "numjobs": 4, "filename": "deep", "offset_increment": "1m", "direct": 1,
        "ioengine": "libaio", "iodepth": 8,
    },
    "verified while it writes": {"verify_backlog": 32},
    "verified while it writes, direct and deep": {
        "verify_backlog": 32, "direct": 1, "ioengine": "libaio", "iodepth": 16,
    },
    "verified by threads": {"verify_async": 2, "ioengine": "io_uring", "iodepth": 16},
    "fsync=32": {"fsync": 32},
    "fdatasync=8": {"fdatasync": 8},
    "fsync=32 of a mapping": {"ioengine": "mmap", "fsync": 32},
    "end_fsync": {"end_fsync": 1},
    "O_SYNC": {"sync": "sync", "size": "512k"},
    "O_DSYNC": {"sync": "dsync", "size": "512k"},
    "sync_file_range": {"sync_file_range": "write:8"},
    "fallocate=none": {"fallocate": "none"},
    "fallocate=native, the default of fio": {"fallocate": "native"},
    "fallocate=posix": {"fallocate": "posix"},
    "fallocate=truncate": {"fallocate": "truncate"},
    "overwrite of a file laid out before": {"overwrite": 1, "pre_read": 1},
    "behind the end": {"rw": "write", "file_append": 1},
    "time_based": {"time_based": 1, "runtime": 1, "verify_backlog": 16},
    "again and again": {"loops": 3, "size": "512k"},
    "blocks of all sizes": {"bsrange": "512-128k"},
    "blocks of all sizes, not aligned": {"bsrange": "512-128k", "bs_unaligned": 1},
    "blocks of 512 bytes, direct": {"bs": "512", "direct": 1, "size": "64k"},
    "many small files": {
        "nrfiles": 32, "openfiles": 8, "filesize": "8k", "bs": "1k", "size": "256k",
    },
    "a hot spot": {"random_distribution": "zipf:1.2", "norandommap": 1, "io_size": "2m"},
    "registered buffers and files": {
        "ioengine": "io_uring", "iodepth": 16, "direct": 1, "fixedbufs": 1, "registerfiles": 1,
    },
    "a polling kernel thread": {
        "ioengine": "io_uring", "iodepth": 16, "direct": 1, "sqthread_poll": 1,
    },
    "vectors": {"ioengine": "pvsync2"},
    "POSIX aio": {"ioengine": "posixaio", "iodepth": 8},
}  # fmt: skip

# Options that end with one error, and that docs/fio.md names.
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "a mapping of an O_DIRECT descriptor": (
        {"ioengine": "mmap", "direct": 1}, "No such device"
    ),
    "fallocate=keep": ({"fallocate": "keep"}, "Operation not supported"),
    "trim": ({"rw": "trimwrite"}, "Inappropriate ioctl"),
}  # fmt: skip


def command(place: Path, **options: object) -> list[str]:
    """The fio command line of one job in a directory."""
    words = [f"--{key}={value}" for key, value in (VERIFY | options).items()]
    return ["fio", "--name=v", f"--directory={place}", *words, "--output-format=json"]


def check(printed: str) -> None:
    """No job has met an error, and fio has read back what it wrote."""
    jobs = json.loads(printed[printed.index("{") :])["jobs"]
    for job in jobs:
        assert job["error"] == 0
        assert job["write"]["io_bytes"] > 0
        assert job["read"]["io_bytes"] > 0
    assert jobs


@pytest.fixture
def place(shared: LocalCluster, request: pytest.FixtureRequest) -> Path:
    path = shared.mount / f"t{crc32(request.node.name.encode()):08x}"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def io_uring(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether this kernel lets processes use io_uring, anywhere."""
    local = tmp_path_factory.mktemp("uring")
    done = run(*command(local, ioengine="io_uring", rw="write", size="4k"), cwd=local, check=False)
    return done.returncode == 0


def perform(place: Path, io_uring: bool, **options: object) -> None:
    if options["ioengine"] == "io_uring" and not io_uring:
        pytest.skip("the kernel does not allow io_uring")
    check(run(*command(place, **options), cwd=place, timeout_s=JOB_TIMEOUT_S).stdout)


@pytest.mark.parametrize(("engine", "direct", "block", "pattern", "size"), ENGINES)
def test_every_engine_verifies(
    place: Path, io_uring: bool, engine: str, direct: int, block: str, pattern: str, size: str
) -> None:
    depth = 16 if engine in ASYNCHRONOUS else 1
    perform(
        place, io_uring, ioengine=engine, direct=direct, bs=block, rw=pattern, size=size,
        iodepth=depth,
    )  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_verifies(place: Path, io_uring: bool, name: str) -> None:
    usual = {"ioengine": "psync", "rw": "randwrite", "bs": "16k", "size": "1m"}
    perform(place, io_uring, **(usual | OPTIONS[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_told(place: Path, name: str) -> None:
    options, reason = REFUSED[name]
    usual = {"ioengine": "psync", "rw": "randwrite", "bs": "16k", "size": "1m"}
    done = run(*command(place, **(usual | options)), cwd=place, check=False)
    assert done.returncode != 0
    assert reason in done.stdout + done.stderr


def test_another_run_verifies_what_the_first_one_wrote(place: Path) -> None:
    """verify_only reads from the servers what an earlier fio, ended long ago, has written."""
    options = {"ioengine": "libaio", "iodepth": 8, "rw": "randwrite", "bs": "16k", "size": "4m"}
    written = run(*command(place, **options, end_fsync=1, do_verify=0), cwd=place)
    assert json.loads(written.stdout[written.stdout.index("{") :])["jobs"][0]["error"] == 0
    done = run(*command(place, **options, verify_only=1, invalidate=1), cwd=place)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["read"]["io_bytes"] == 4 << 20


def test_a_flipped_byte_is_found(place: Path) -> None:
    """The checks above can fail: fio reports a byte that somebody else has changed."""
    options = {"ioengine": "psync", "rw": "write", "bs": "16k", "size": "1m"}
    run(*command(place, **options, do_verify=0), cwd=place)
    with (place / "v.0.0").open("r+b") as file:
        file.seek(300_000)
        byte = file.read(1)
        file.seek(300_000)
        file.write(bytes([byte[0] ^ 1]))
    done = run(*command(place, **options, verify_only=1), cwd=place, check=False)
    assert done.returncode != 0
    assert "verify" in done.stdout + done.stderr


def test_a_storage_is_killed_under_verification(fresh: LocalCluster) -> None:
    """kill -9 amid deep direct writes that are read back all the time: no error, no wrong byte."""
    fio = subprocess.Popen(
        command(
            fresh.mount, ioengine="libaio", iodepth=8, direct=1, rw="randwrite", bs="16k",
            size="5m", numjobs=2, verify_backlog=16, rate_iops=60, fsync=32,
        ),
        stdout=subprocess.PIPE,
        cwd=fresh.root,
        text=True,
    )  # fmt: skip
    try:
        time.sleep(1.5)
        fresh.kill("storage1")
        time.sleep(1.5)
        assert fio.poll() is None, "fio ended early"
        fresh.start("storage1")
        output, _ = fio.communicate(timeout=JOB_TIMEOUT_S)
    finally:
        fio.kill()
        fio.wait()
    assert fio.returncode == 0
    check(output)
    fresh.wait_serving()
    assert "clean:" in fresh.fsck()


def test_nothing_is_left_to_mend(shared: LocalCluster) -> None:
    """After all of the above: replicas equal, checksums right, no block owned twice."""
    assert "clean:" in shared.fsck()
