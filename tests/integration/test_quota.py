"""Quotas, tree removal and the trash on a real cluster with a real mount."""

import errno
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from emberfs.client.blocking import Client
from integration.harness import BIN, LocalCluster, run, wait_until

MIB = 1 << 20
NUMBERS = itertools.count()


def command(
    cluster: LocalCluster, *words: object, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command that has sub-commands: the directory comes last."""
    return run(BIN / "emberfs", *words, "--directory", cluster.directory, check=check)


@pytest.fixture
def place(shared: LocalCluster) -> Path:
    """A fresh directory in the mount."""
    made = shared.mount / f"place{next(NUMBERS)}."
    made.mkdir()
    return made


def active(cluster: LocalCluster, path: Path) -> bool:
    return "active" in command(cluster, "quota", "show", path).stdout


def refusal(work: object) -> int:
    with pytest.raises(OSError) as caught:
        work()  # type: ignore[operator]
    assert caught.value.errno is not None
    return caught.value.errno


def test_a_writer_is_refused_at_write(shared: LocalCluster, place: Path) -> None:
    command(shared, "quota", "set", place, "--bytes", "10M")
    with (place / "f").open("wb", buffering=0) as file:

        def write_on() -> None:
            for _ in range(64):
                file.write(os.urandom(256 << 10))

        assert refusal(write_on) == errno.EDQUOT
        assert os.fstat(file.fileno()).st_size == 10 * MIB, "exact for one writer"
        file.seek(0)
        file.write(b"x")  # inside the file there is room
    assert (place / "f").stat().st_size == 10 * MIB
    assert refusal(lambda: (place / "g").write_bytes(b"x")) == errno.EDQUOT
    os.truncate(place / "f", 9 * MIB)
    (place / "g").write_bytes(b"x" * MIB)
    assert refusal(lambda: os.truncate(place / "f", 9 * MIB + 1)) == errno.EDQUOT
    (place / "f").unlink()
    (place / "h").write_bytes(b"x" * 5 * MIB)


def test_dd_stops_at_the_limit(shared: LocalCluster, place: Path) -> None:
    command(shared, "quota", "set", place, "--bytes", "8M")
    for flags in ("", "direct"):
        flag = (f"oflag={flags}",) if flags else ()
        done = run("dd", "if=/dev/zero", f"of={place}/f", "bs=1M", "count=20", *flag, check=False)
        assert done.returncode
        assert "quota" in done.stderr.lower()
        assert (place / "f").stat().st_size == 8 * MIB
        (place / "f").unlink()


def test_several_writers_stay_within_the_bound(shared: LocalCluster, place: Path) -> None:
    command(shared, "quota", "set", place, "--bytes", "40M")
    writers = [
        subprocess.Popen(
            ["dd", "if=/dev/zero", f"of={place}/f{number}", "bs=256K", "count=400"],
            stderr=subprocess.DEVNULL,
        )
        for number in range(4)
    ]
    assert all(writer.wait(60) for writer in writers)
    total = sum(path.stat().st_size for path in place.iterdir())
    assert 40 * MIB - 4 * MIB <= total <= 40 * MIB + 4 * 5 * MIB


def test_names_are_counted(shared: LocalCluster, place: Path) -> None:
    command(shared, "quota", "set", place, "--files", "5")
    for number in range(4):
        (place / str(number)).mkdir()
    for refused in (
        lambda: (place / "x").mkdir(),
        lambda: (place / "0/x").touch(),
        lambda: (place / "x").symlink_to("y"),
    ):
        assert refusal(refused) == errno.EDQUOT
    os.rmdir(place / "3")
    (place / "0/x").touch()


def test_content_is_counted_and_moves_as_users_expect(shared: LocalCluster, place: Path) -> None:
    (place / "a/deep").mkdir(parents=True)
    (place / "b").mkdir()
    for number in range(100):
        (place / f"a/deep/{number}").write_bytes(b"x" * 1000)
    command(shared, "quota", "set", place / "a", "--bytes", "1M", "--files", "1K")
    wait_until(lambda: active(shared, place / "a"), 10)
    shown = command(shared, "quota", "show", place / "a/deep/7").stdout
    assert "102" in shown
    assert "1000" in shown
    os.rename(place / "a/deep/1", place / "b/1")
    assert refusal(lambda: os.rename(place / "a/deep", place / "b/deep")) == errno.EXDEV
    assert refusal(lambda: os.link(place / "b/1", place / "a/1")) == errno.EXDEV
    run("mv", place / "a/deep", place / "b/deep")
    assert len(list((place / "b/deep").iterdir())) == 99
    assert str(place.name) in command(shared, "quota", "list").stdout
    command(shared, "quota", "remove", place / "a")
    wait_until(lambda: place.name not in command(shared, "quota", "list").stdout, 10)
    assert "finding" not in shared.fsck()


def test_df_shows_the_quota(shared: LocalCluster, place: Path) -> None:
    def blocks() -> int:
        return int(run("df", "--output=size", "-B1M", shared.mount).stdout.split()[-1])

    whole = blocks()
    command(shared, "quota", "set", place, "--bytes", "64M", "--files", "100")
    (place / "f").write_bytes(b"x" * 16 * MIB)
    with Client(shared.plan.mgmtd_address, cluster=shared.plan.cluster) as fs:
        space = fs.statvfs(f"/{place.name}")
        assert space.f_blocks * space.f_frsize == 64 * MIB
        assert space.f_bavail * space.f_frsize == 48 * MIB
        assert (space.f_files, space.f_favail) == (100, 98)
    for below in (place, place / "f"):
        found = os.statvfs(below)
        assert found.f_blocks * found.f_frsize == 64 * MIB
        assert found.f_bavail * found.f_frsize == 48 * MIB
        assert (found.f_files, found.f_favail) == (100, 98)
    sizes = run("df", "--output=size,used,avail", "-B1M", place).stdout.split()[-3:]
    assert sizes == ["64", "16", "48"]
    inodes = run("df", "--output=itotal,iavail", place).stdout.split()[-2:]
    assert inodes == ["100", "98"]
    assert abs(blocks() - whole) < whole // 10, "the whole file system is shown above it"


def test_meta_is_killed_while_it_counts(shared: LocalCluster, place: Path) -> None:
    (place / "a").mkdir()
    for number in range(300):
        (place / f"a/{number}").touch()
    command(shared, "quota", "set", place, "--files", "10K")
    shared.kill("meta")
    shared.start("meta")
    wait_until(lambda: active(shared, place), 30)
    assert " 302 " in command(shared, "quota", "show", place).stdout
    shared.emberfs("rm", "-r", f"/{place.name}")
    shared.kill("meta")
    shared.start("meta")
    assert not place.exists()
    wait_until(lambda: place.name not in command(shared, "quota", "list").stdout, 30)
    shared.fsck()


def test_df_shows_what_can_be_stored(shared: LocalCluster) -> None:
    """Three replicas on one disk: a third of it, however many services share the disk."""
    disk, mounted = os.statvfs(shared.directory), os.statvfs(shared.mount)
    usable = disk.f_bavail * disk.f_frsize / 3
    shown = mounted.f_bavail * mounted.f_frsize
    assert 0.5 * usable < shown <= 1.05 * usable


# ---------------------------------------------------------------- trees and trash


def test_rm_removes_a_tree_whose_files_are_open(shared: LocalCluster, place: Path) -> None:
    shutil.copytree("/usr/share/doc/bash", place / "t/u/doc")
    (place / "t/f").write_bytes(b"held" * 100_000)
    with (place / "t/f").open("rb") as held:
        shared.emberfs("rm", "-r", place / "t")
        assert os.listdir(place) == []
        assert refusal(lambda: os.listdir(place / "t/u")) == errno.ENOENT
        wait_until(lambda: os.fstat(held.fileno()).st_nlink == 0, 10)
        assert held.read() == b"held" * 100_000
    shared.fsck()


def test_the_working_directory_is_gone_with_its_tree(shared: LocalCluster, place: Path) -> None:
    (place / "t/u/v").mkdir(parents=True)
    script = "emberfs_rm=$1; shift; cd t/u/v && $emberfs_rm rm -r /$1/t -d $2 && touch x"
    done = subprocess.run(
        ["sh", "-c", script, "sh", str(BIN / "emberfs"), place.name, str(shared.directory)],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode
    assert "No such file" in done.stderr


def test_trash_list_restore_empty(shared: LocalCluster, place: Path) -> None:
    (place / "t").mkdir()
    (place / "t/f").write_text("kept")
    shared.emberfs("rm", "--trash", place / "t")
    assert not (place / "t").exists()
    path = f"/{place.name}/t"
    assert path in command(shared, "trash", "list").stdout
    (place / "t").touch()
    refused = command(shared, "trash", "restore", path, check=False)
    assert "exists" in refused.stderr
    (place / "t").unlink()
    command(shared, "trash", "restore", path)
    assert (place / "t/f").read_text() == "kept"
    shared.emberfs("rm", "--trash", place / "t")
    command(shared, "trash", "empty", path)
    assert "not in your trash" in command(shared, "trash", "restore", path, check=False).stderr
    shared.fsck()


def test_bad_arguments_are_one_line(shared: LocalCluster, place: Path) -> None:
    for words in (
        ("quota", "set", place),
        ("quota", "set", place, "--bytes", "lots"),
        ("quota", "set", place, "--bytes", "99999999P"),
        ("quota", "set", f"/{place.name}/none", "--bytes", "1M"),
        ("quota", "remove", place),
        ("rm", f"/{place.name}/none"),
        ("rm", "-r", "/"),
    ):
        done = command(shared, *words, check=False)
        assert done.returncode == 1, words
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
