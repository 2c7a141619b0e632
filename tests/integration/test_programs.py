"""Real programs on the mount: what they write is what they read."""

import json
import os
import random
import shutil
import sqlite3
import sysconfig
from pathlib import Path

import pytest

from integration.harness import LocalCluster, run


@pytest.fixture
def place(shared: LocalCluster, request: pytest.FixtureRequest) -> Path:
    path = shared.mount / request.node.name.replace("[", "-").strip("]")
    path.mkdir()
    return path


def standard_library(*parts: str) -> Path:
    return Path(sysconfig.get_path("stdlib"), *parts)


def test_o17_copy_of_a_tree_is_equal(place: Path) -> None:
    """A copied tree is equal, byte by byte."""
    source = standard_library("json")
    for package in ("json", "asyncio", "email", "xml"):
        run("cp", "-a", standard_library(package), place)
        run("diff", "-r", standard_library(package), place / package)
    run("cp", "-a", place / "json", place / "again")
    run("diff", "-r", source, place / "again")


def test_git(place: Path) -> None:
    shutil.copytree(standard_library("json"), place / "json")
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")
    run(*git, "init", "-q", ".", cwd=place)
    run(*git, "add", ".", cwd=place)
    run(*git, "commit", "-qm", "first", cwd=place)
    (place / "json" / "__init__.py").write_text("changed\n")
    run(*git, "commit", "-qam", "second", cwd=place)
    run(*git, "gc", "-q", cwd=place)
    run(*git, "fsck", "--strict", cwd=place)
    assert run(*git, "log", "--format=%s", cwd=place).stdout.split() == ["second", "first"]
    run(*git, "checkout", "-q", "HEAD~1", cwd=place)
    run("diff", "-r", standard_library("json"), place / "json")


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_sqlite(place: Path, mode: str) -> None:
    path = place / "db"
    with sqlite3.connect(path) as database:
        assert database.execute(f"pragma journal_mode={mode}").fetchone() == (mode,)
        database.execute("create table t(k integer primary key, v blob)")
        for key in range(300):
            database.execute("insert into t values (?, ?)", (key, os.urandom(key * 7)))
            if key % 50 == 0:
                database.commit()
        database.commit()
        database.execute("delete from t where k % 3 = 0")
        database.commit()
        database.execute("vacuum")
    database.close()
    with sqlite3.connect(path) as again:
        assert again.execute("pragma integrity_check").fetchone() == ("ok",)
        assert again.execute("select count(*) from t").fetchone() == (200,)
    again.close()


def test_tar_in_and_out(place: Path) -> None:
    run("tar", "-cf", place / "a.tar", "-C", standard_library(), "email")
    (place / "out").mkdir()
    run("tar", "-xf", place / "a.tar", "-C", place / "out")
    run("diff", "-r", standard_library("email"), place / "out" / "email")


def test_compile_and_run_a_program(place: Path) -> None:
    (place / "hello.c").write_text('#include <stdio.h>\nint main(void) { puts("ember"); }\n')
    run("gcc", "-g", "-o", place / "hello", place / "hello.c", cwd=place)
    assert run(place / "hello").stdout == "ember\n"


@pytest.mark.parametrize("direct", [0, 1])
@pytest.mark.parametrize("pattern", ["write", "randwrite"])
@pytest.mark.parametrize("block", ["4k", "64k", "1m"])
def test_o17_fio_verifies(place: Path, direct: int, pattern: str, block: str) -> None:
    """fio verifies every block that it wrote."""
    size = {"4k": "2m", "64k": "8m", "1m": "24m"}[block]
    done = run(
        "fio", "--name=v", f"--directory={place}", f"--rw={pattern}", f"--bs={block}",
        f"--size={size}", f"--direct={direct}", "--verify=crc32c", "--verify_fatal=1",
            "--verify_state_save=0",
        "--ioengine=psync", "--fsync_on_close=1", "--output-format=json",
    )  # fmt: skip
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["read"]["io_bytes"] > 0


def test_mapped_memory(place: Path) -> None:
    import mmap

    path = place / "map"
    content = bytearray(random.Random(1).randbytes(300_000))
    path.write_bytes(content)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        assert memory[:] == content
        memory[100_000:100_005] = content[100_000:100_005] = b"ember"
        memory.flush()
    assert path.read_bytes() == content


def test_a_sparse_file_reads_zeros(place: Path) -> None:
    path = place / "sparse"
    with path.open("wb") as file:
        file.seek(5_000_000)
        file.write(b"end")
    data = path.read_bytes()
    assert len(data) == 5_000_003
    assert data[:5_000_000].count(0) == 5_000_000
    assert data.endswith(b"end")


def test_o17_a_file_of_random_writes_equals_its_model(place: Path) -> None:
    """A file of random writes equals its model in full content."""
    choose = random.Random(7)
    model = bytearray()
    path = place / "model"
    with path.open("w+b", buffering=0) as file:
        for _ in range(300):
            offset = choose.randrange(3_500_000)
            if choose.random() < 0.1:
                file.truncate(offset)
                model = model[:offset].ljust(offset, b"\0")
            else:
                data = choose.randbytes(choose.choice([10, 4096, 70_000, 1_100_000]))
                file.seek(offset)
                file.write(data)
                model = model.ljust(offset + len(data), b"\0")
                model[offset : offset + len(data)] = data
        file.seek(0)
        assert file.read() == model
    assert path.read_bytes() == model


def test_the_cluster_is_clean_afterwards(shared: LocalCluster) -> None:
    os.sync()
    assert "clean:" in shared.fsck()
