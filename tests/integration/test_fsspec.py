"""emberfs:// for fsspec: its own suite for file systems, and what that leaves out."""

import contextlib
import io
import json
import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import fsspec.tests.abstract as abstract
import pytest

from emberfs.client.ecosystem.fsspec import EmberFileSystem
from integration.harness import LocalCluster, run

DATA = random.Random(6).randbytes(3_000_000)


@pytest.fixture(scope="module")
def files(shared: LocalCluster) -> Iterator[EmberFileSystem]:
    found = fsspec.filesystem(
        "emberfs", mgmtd=shared.plan.mgmtd_address, cluster=shared.plan.cluster
    )
    yield found
    found.close()


class Fixtures(abstract.AbstractFixtures):
    @pytest.fixture
    def fs(self, files):
        return files

    @pytest.fixture
    def fs_path(self):
        return "/suite"


class TestCopy(abstract.AbstractCopyTests, Fixtures):
    pass


class TestGet(abstract.AbstractGetTests, Fixtures):
    pass


class TestPut(abstract.AbstractPutTests, Fixtures):
    pass


class TestPipe(abstract.AbstractPipeTests, Fixtures):
    pass


class TestOpen(abstract.AbstractOpenTests, Fixtures):
    pass


def url(shared: LocalCluster, path: str) -> str:
    return f"emberfs://{shared.plan.mgmtd_address}{path}"


def test_urls_and_variables(shared: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    name = shared.plan.cluster
    with fsspec.open(url(shared, "/urls/a.txt"), "wt", cluster=name) as file:
        file.write("hello")
    assert (shared.mount / "urls/a.txt").read_text() == "hello"
    monkeypatch.setenv("EMBERFS_MGMTD", shared.plan.mgmtd_address)
    monkeypatch.setenv("EMBERFS_CLUSTER", name)
    with fsspec.open("emberfs:///urls/a.txt", "rb") as file:
        assert file.read() == b"hello"
    monkeypatch.delenv("EMBERFS_MGMTD")
    EmberFileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match="EMBERFS_MGMTD"):
        fsspec.filesystem("emberfs")


def test_what_is_said_of_files(shared: LocalCluster, files: EmberFileSystem) -> None:
    files.pipe_file("/info/a", DATA)
    about = files.info("emberfs://anywhere:1/info/a")
    assert (about["type"], about["size"], about["name"]) == ("file", len(DATA), "/info/a")
    assert files.ls("/info", detail=False) == ["/info/a"]
    assert files.ls("/info/a") == [about]
    os.symlink("a", shared.mount / "info/link")
    os.symlink("nowhere", shared.mount / "info/broken")
    kinds = {one["name"]: (one["type"], one["islink"]) for one in files.ls("/info")}
    assert kinds == {
        "/info/a": ("file", False),
        "/info/broken": ("link", True),
        "/info/link": ("file", True),
    }
    before = files.ukey("/info/a"), files.checksum("/info/a")
    assert before == (files.ukey("/info/a"), files.checksum("/info/a"))
    files.pipe_file("/info/a", b"other")
    assert files.ukey("/info/a") != before[0]
    assert files.checksum("/info/a") != before[1]
    assert files.modified("/info/a") >= files.created("/info/a").replace(year=2020)
    for missing in ("/info/none", "/info/a/below"):
        assert not files.exists(missing)
        with pytest.raises(OSError):
            files.info(missing)


def test_ranges_of_many_files(files: EmberFileSystem) -> None:
    dice = random.Random(1)
    for number in range(70):
        files.pipe_file(f"/ranges/{number}", DATA[number * 1000 :])
    paths, starts, ends = [], [], []
    for _ in range(300):
        paths.append(f"/ranges/{dice.randrange(70)}")
        starts.append(dice.randrange(100_000))
        ends.append(starts[-1] + dice.randrange(5000))
    found = files.cat_ranges(paths, starts, ends)
    for path, start, end, content in zip(paths, starts, ends, found, strict=True):
        at = int(path.rsplit("/", 1)[1]) * 1000
        assert content == DATA[at + start : at + end]
    assert files.cat_ranges(["/ranges/1"] * 2, [-10, None], [None, -len(DATA) + 1010]) == [
        DATA[-10:],
        DATA[1000:1010],
    ]
    (problem,) = files.cat_ranges(["/ranges/none"], 0, 5)
    assert isinstance(problem, FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        files.cat_ranges(["/ranges/none"], 0, 5, on_error="raise")


def test_modes(files: EmberFileSystem) -> None:
    with files.open("/modes/a", "wb") as file:
        assert file.write(DATA) == len(DATA)
    with files.open("/modes/a", "ab") as file:
        file.write(b"tail")
    with files.open("/modes/a", "rb") as file:
        assert isinstance(file, io.BufferedReader)
        file.seek(-10, os.SEEK_END)
        assert file.read() == DATA[-6:] + b"tail"
        memory = bytearray(1_500_000)
        file.seek(123)
        assert file.readinto(memory) == len(memory)
        assert memory == DATA[123 : 123 + len(memory)]
    with files.open("/modes/a", "r+b") as file:
        file.seek(5)
        file.write(b"middle")
    assert files.cat_file("/modes/a", 0, 20) == DATA[:5] + b"middle" + DATA[11:20]
    with pytest.raises(FileExistsError):
        files.open("/modes/a", "xb")
    with pytest.raises(FileExistsError):
        files.pipe_file("/modes/a", b"", mode="create")
    files.touch("/modes/a", truncate=False)
    assert files.info("/modes/a")["size"] == len(DATA) + 4
    files.touch("/modes/a")
    assert files.info("/modes/a")["size"] == 0


def test_moving_and_removing(files: EmberFileSystem) -> None:
    for path in ("/moves/a/1", "/moves/a/b/2", "/moves/c"):
        files.pipe_file(path, path.encode())
    files.mv("/moves/a", "/moves/new/a", recursive=True)
    assert files.find("/moves") == ["/moves/c", "/moves/new/a/1", "/moves/new/a/b/2"]
    files.mv("/moves/c", "/moves/new")
    assert files.cat_file("/moves/new/c") == b"/moves/c"
    assert sorted(files.glob("/moves/**/[12]")) == ["/moves/new/a/1", "/moves/new/a/b/2"]
    files.rm("/moves/new/a/[0-9]")
    assert files.exists("/moves/new/a/b")
    files.rm("/moves", recursive=True)
    assert not files.exists("/moves")
    with pytest.raises(FileNotFoundError):
        files.rm("/moves")
    files.mkdir("/moves/x/y")
    with pytest.raises(OSError):
        files.rmdir("/moves/x")
    with pytest.raises(FileExistsError):
        files.mkdir("/moves/x")


def test_transactions(files: EmberFileSystem) -> None:
    files.pipe_file("/trans/a", b"old")
    with files.transaction:
        with files.open("/trans/a", "wb") as file:
            file.write(b"new")
        assert files.cat_file("/trans/a") == b"old"
    assert files.cat_file("/trans/a") == b"new"
    with contextlib.suppress(KeyError), files.transaction:
        with files.open("/trans/a", "wb") as file:
            file.write(b"newer")
        raise KeyError
    assert files.cat_file("/trans/a") == b"new"
    assert files.ls("/trans", detail=False) == ["/trans/a"]


def test_threads(files: EmberFileSystem) -> None:
    def work(number: int) -> bytes:
        files.pipe_file(f"/threads/{number}", DATA[number:100_000])
        return files.cat_file(f"/threads/{number}")

    with ThreadPoolExecutor(8) as pool:
        for number, content in enumerate(pool.map(work, range(40))):
            assert content == DATA[number:100_000]


WORKERS = """
import multiprocessing, sys
import fsspec

def work(wanted):
    files, path = wanted
    return len(files.cat_file(path))

if __name__ == "__main__":
    mgmtd, cluster, path, method, connected = sys.argv[1:]
    files = fsspec.filesystem("emberfs", mgmtd=mgmtd, cluster=cluster)
    if connected == "yes":
        files.exists(path)
    with multiprocessing.get_context(method).Pool(2) as pool:
        print(pool.map(work, [(files, path)] * 4))
"""


@pytest.mark.parametrize(
    ("method", "connected"), [("fork", "no"), ("spawn", "no"), ("spawn", "yes"), ("fork", "yes")]
)
def test_worker_processes(
    shared: LocalCluster, files: EmberFileSystem, tmp_path: Path, method: str, connected: str
) -> None:
    """As data loaders have them: what is pickled, or comes by fork, connects by itself."""
    files.pipe_file("/processes/a", DATA)
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    plan = shared.plan
    done = run(
        sys.executable, script, plan.mgmtd_address, plan.cluster, "/processes/a", method, connected,
        check=False,
    )  # fmt: skip
    if (method, connected) == ("fork", "yes"):
        assert "start workers with spawn" in done.stderr
    else:
        assert done.stdout == f"{[len(DATA)] * 4}\n", done.stderr


def test_it_can_be_described(files: EmberFileSystem) -> None:
    again = fsspec.AbstractFileSystem.from_json(files.to_json())
    assert again.fsid == files.fsid
    assert json.loads(files.to_json())["protocol"] == "emberfs"
