"""Two mounts of one cluster: what one changes the other sees at once, though it caches for long."""

import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from integration.harness import BIN, LocalCluster, local_cluster, wait_until

AT_ONCE_S = 1.0  # far below the time for which names are believed, far above what it takes
SHORT_S = 1.0  # how long names are believed while not every change is heard


class Mount:
    """A mount by a daemon of its own."""

    def __init__(self, path: Path, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.path = path
        self.process = process
        self._port = port

    def requests(self, operation: str) -> int:
        """How many requests of a kind the kernel has sent."""
        url = f"http://127.0.0.1:{self._port}/metrics"
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        found = re.search(rf'emberfs_fuse_operations_total{{operation="{operation}"}} (\S+)', text)
        return int(float(found[1])) if found else 0


@contextmanager
def another_mount(cluster: LocalCluster, name: str) -> Iterator[Mount]:
    """Mount the cluster at a second place, with the settings of the first."""
    place, port = cluster.root / name, cluster.base_port + 19
    place.mkdir()
    text = cluster.plan.process("fuse").config.read_text()
    text = re.sub(r"(?m)^mountpoint *=.*$", f'mountpoint = "{place}"', text)
    text = re.sub(r"(?m)^metrics_port *=.*$", f"metrics_port = {port}", text)
    config = cluster.root / f"{name}.toml"
    config.write_text(text)
    with (cluster.directory / "log" / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [BIN / "emberfs-fuse", "--config", config], stdout=log, stderr=log
        )
    try:
        wait_until(place.is_mount, 20)
        yield Mount(place, process, port)
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(25)
        except subprocess.TimeoutExpired:
            process.kill()
        subprocess.run(["fusermount3", "-uz", place], check=False, capture_output=True, timeout=20)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as found:
        found.up()
        yield found


@pytest.fixture(scope="module")
def other(cluster: LocalCluster) -> Iterator[Mount]:
    with another_mount(cluster, "other") as mount:
        wait_until(lambda: caches(mount), 20)
        yield mount


def caches(mount: Mount) -> bool:
    """Tell whether a name that was asked for is not asked for again."""
    path = mount.path / "nobody"
    before = mount.requests("lookup")
    for _ in range(3):
        path.exists()
    return mount.requests("lookup") - before <= 1


@pytest.fixture
def here(cluster: LocalCluster, request: pytest.FixtureRequest) -> Path:
    path = cluster.mount / request.node.name
    path.mkdir()
    return path


@pytest.fixture
def there(other: Mount, here: Path) -> Path:
    return other.path / here.name


def at_once(condition: object) -> None:
    wait_until(condition, AT_ONCE_S, pause_s=0.005)


def test_a_name_that_was_missing_is_there_when_it_is_made(here: Path, there: Path) -> None:
    assert not (there / "a").exists()
    assert not (there / "d").exists()
    (here / "a").write_bytes(b"x")
    (here / "d").mkdir()
    at_once((there / "a").exists)
    at_once((there / "d").is_dir)
    assert (there / "a").read_bytes() == b"x"


def test_a_removed_name_is_gone(here: Path, there: Path) -> None:
    (here / "a").write_bytes(b"x")
    (here / "d").mkdir()
    at_once((there / "a").exists)
    assert (there / "d").is_dir()
    (here / "a").unlink()
    (here / "d").rmdir()
    at_once(lambda: not (there / "a").exists())
    at_once(lambda: not (there / "d").exists())
    assert os.listdir(there) == []


def test_a_renamed_file_has_its_new_name_only(here: Path, there: Path) -> None:
    for name in ("a", "b"):
        (here / name).write_text(name)
        assert (there / name).read_text() == name
    assert not (there / "c").exists()
    (here / "a").rename(here / "b")
    at_once(lambda: not (there / "a").exists())
    assert (there / "b").read_text() == "a"
    (here / "b").rename(here / "c")
    at_once((there / "c").exists)
    assert not (there / "b").exists()


def test_attributes_are_those_that_the_other_mount_has_set(here: Path, there: Path) -> None:
    (here / "a").write_bytes(b"x")
    at_once((there / "a").exists)
    (here / "a").chmod(0o600)
    at_once(lambda: (there / "a").stat().st_mode & 0o777 == 0o600)
    os.utime(here / "a", ns=(5, 7))
    at_once(lambda: (there / "a").stat().st_mtime_ns == 7)
    os.link(here / "a", here / "b")
    at_once(lambda: (there / "a").stat().st_nlink == 2)
    os.setxattr(here / "a", "user.k", b"v")
    at_once(lambda: os.listxattr(there / "a") == ["user.k"])


def test_the_length_of_a_file_that_is_written_and_synced(here: Path, there: Path) -> None:
    with (here / "a").open("wb") as file:
        at_once((there / "a").exists)
        for count in range(1, 4):
            file.write(b"x" * 1000)
            file.flush()
            os.fsync(file.fileno())
            at_once(lambda count=count: (there / "a").stat().st_size == count * 1000)


def test_a_reader_follows_a_file_that_grows_and_never_sees_zeros(here: Path, there: Path) -> None:
    line, lines = b"0123456789abcdef\n", 300
    with (here / "log").open("ab", buffering=0) as file:
        at_once((there / "log").exists)
        with (there / "log").open("rb", buffering=0) as reader:
            found, end = b"", time.monotonic() + 30
            written = 0
            while len(found) < lines * len(line) and time.monotonic() < end:
                if written < lines:
                    file.write(line)
                    written += 1
                    if written % 20 == 0:
                        os.fsync(file.fileno())
                found += reader.read(4096)
                assert found == (line * lines)[: len(found)]
            assert len(found) == lines * len(line)


def test_what_does_not_change_is_not_asked_for_again(other: Mount, here: Path, there: Path) -> None:
    (here / "a").write_bytes(b"x")
    at_once((there / "a").exists)
    assert not (there / "none").exists()
    wait_until(lambda: caches(other), 10)
    (there / "a").stat()
    before = [other.requests(operation) for operation in ("lookup", "getattr")]
    end = time.monotonic() + 3 * SHORT_S
    while time.monotonic() < end:
        (there / "a").stat()
        assert not (there / "none").exists()
        time.sleep(0.05)
    assert [other.requests(operation) for operation in ("lookup", "getattr")] == before


def test_a_daemon_that_stood_still_forgets(other: Mount, here: Path, there: Path) -> None:
    (here / "a").write_bytes(b"x")
    at_once((there / "a").exists)
    other.process.send_signal(signal.SIGSTOP)
    try:
        (here / "a").unlink()
        time.sleep(6)  # longer than it is believed that no news is good news
    finally:
        other.process.send_signal(signal.SIGCONT)
    at_once(lambda: not (there / "a").exists())


def test_names_are_right_after_a_death_of_meta(
    cluster: LocalCluster, other: Mount, here: Path, there: Path
) -> None:
    (here / "a").write_bytes(b"x")
    at_once((there / "a").exists)
    cluster.kill("meta")
    cluster.start("meta")
    (here / "a").unlink()
    at_once(lambda: not (there / "a").exists())
    wait_until(lambda: caches(other), 20)
