"""emberfs:// for fsspec on a real cluster: fsspec's own suite, then what it does not ask."""

import ctypes
import os
import pickle
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import fsspec
import pytest
from fsspec.tests import abstract

from emberfs.client.ecosystem.fsspec import EmberFileSystem
from emberfs.client.ecosystem.session import session
from integration.harness import LocalCluster, wait_until
from integration.scripts import script

NUMBERS = count()


@pytest.fixture(scope="module")
def place(shared: LocalCluster) -> Iterator[dict[str, str]]:
    """Storage options of the cluster."""
    options = {"mgmtd": shared.plan.mgmtd_address, "cluster": shared.plan.cluster}
    yield options
    session(EmberFileSystem(**options).place).close()


@pytest.fixture
def fs(place: dict[str, str]) -> EmberFileSystem:
    return EmberFileSystem(**place)


@pytest.fixture
def top(fs: EmberFileSystem) -> Iterator[str]:
    """A directory of the test's own."""
    path = f"/test{next(NUMBERS)}"
    fs.mkdir(path)
    yield path
    fs.rm(path, recursive=True)


class Fixtures(abstract.AbstractFixtures):
    @pytest.fixture
    def fs(self, place: dict[str, str]) -> EmberFileSystem:
        return EmberFileSystem(**place)

    @pytest.fixture
    def fs_path(self, top: str) -> str:
        return top


class TestCopy(abstract.AbstractCopyTests, Fixtures):
    pass


class TestGet(abstract.AbstractGetTests, Fixtures):
    pass


class TestPut(abstract.AbstractPutTests, Fixtures):
    pass


class TestOpen(abstract.AbstractOpenTests, Fixtures):
    pass


class TestPipe(abstract.AbstractPipeTests, Fixtures):
    pass


# ---------------------------------------------------------------- names


def test_moving_replaces_enters_directories_and_keeps_the_inode(
    fs: EmberFileSystem, top: str
) -> None:
    fs.pipe({f"{top}/a": b"a", f"{top}/b": b"b", f"{top}/d/x": b"x"})
    number = fs.info(f"{top}/a")["ino"]
    fs.mv(f"{top}/a", f"{top}/b")
    assert (fs.cat(f"{top}/b"), fs.info(f"{top}/b")["ino"]) == (b"a", number)
    fs.mv(f"{top}/b", f"{top}/d")
    assert fs.info(f"{top}/d/b")["ino"] == number
    fs.mv(f"{top}/d", f"{top}/e/f")
    assert fs.find(top) == [f"{top}/e/f/b", f"{top}/e/f/x"]
    fs.mv(f"{top}/e/f/*", f"{top}/flat/")
    assert fs.find(top) == [f"{top}/flat/b", f"{top}/flat/x"]


def test_moving_into_a_missing_directory_is_refused_without_auto_mkdir(
    place: dict[str, str], top: str
) -> None:
    strict = EmberFileSystem(**place, auto_mkdir=False)
    strict.pipe_file(f"{top}/a", b"a")
    with pytest.raises(FileNotFoundError):
        strict.mv(f"{top}/a", f"{top}/none/a")
    with pytest.raises(FileNotFoundError):
        strict.pipe_file(f"{top}/none/a", b"")
    with pytest.raises(FileNotFoundError):
        strict.open(f"{top}/none/a", "wb")
    assert strict.ls(top, detail=False) == [f"{top}/a"]


def test_what_a_quota_keeps_apart_is_copied(fs: EmberFileSystem, top: str) -> None:
    fs.mkdir(f"{top}/q")
    here = session(fs.place)
    here.run(here.files.set_quota(f"{top}/q", files_max=10))
    fs.pipe({f"{top}/d/a": b"a", f"{top}/d/e/b": b"b"})
    fs.mv(f"{top}/d", f"{top}/q/d")
    assert fs.find(top) == [f"{top}/q/d/a", f"{top}/q/d/e/b"]
    with pytest.raises(OSError, match="quota"):
        fs.pipe({f"{top}/q/{n}": b"" for n in range(10)})


def test_listing_describes_files_directories_and_links(fs: EmberFileSystem, top: str) -> None:
    fs.pipe_file(f"{top}/file", b"12345")
    fs.mkdir(f"{top}/directory")
    fs.symlink("file", f"{top}/to-file")
    fs.symlink(top, f"{top}/directory/up")  # a circle
    fs.symlink("none", f"{top}/dangling")
    fs.link(f"{top}/file", f"{top}/second")
    found = {Path(info["name"]).name: info for info in fs.ls(top)}
    kinds = {name: (info["type"], info["size"]) for name, info in found.items()}
    assert kinds.pop("directory")[0] == "directory"
    expected = dict.fromkeys(("file", "to-file", "second"), ("file", 5))
    assert kinds == expected | {"dangling": ("other", 0)}
    assert found["file"] == fs.info(f"{top}/file")
    assert found["to-file"] == fs.info(f"{top}/to-file")
    assert (found["to-file"]["destination"], found["file"]["nlink"]) == ("file", 2)
    assert len(fs.find(top)) == 5  # of the circle only the link
    assert fs.glob(f"{top}/*e") == [f"{top}/file", f"{top}/to-file"]
    assert fs.lexists(f"{top}/dangling")
    assert not fs.exists(f"{top}/dangling")
    assert fs.islink(f"{top}/dangling")
    assert fs.sizes([f"{top}/file", f"{top}/second"]) == [5, 5]
    fs.rm([f"{top}/dangling", f"{top}/to-file"])
    fs.rm(f"{top}/directory", recursive=True)
    assert fs.cat(f"{top}/file") == b"12345"
    assert list(fs.walk(top)) == [(top, [], ["file", "second"])]


def test_errors_are_of_their_kind(fs: EmberFileSystem, top: str) -> None:
    fs.pipe_file(f"{top}/d/a", b"a")
    with pytest.raises(FileNotFoundError):
        fs.open(f"{top}/none")
    with pytest.raises(FileNotFoundError):
        fs.ls(f"{top}/none")
    with pytest.raises(FileNotFoundError):
        fs.rm(f"{top}/none")
    with pytest.raises(IsADirectoryError):
        fs.open(f"{top}/d")
    with pytest.raises(IsADirectoryError, match="recursive"):
        fs.rm(f"{top}/d")
    with pytest.raises(NotADirectoryError):
        fs.open(f"{top}/d/a/b")
    with pytest.raises(FileExistsError):
        fs.mkdir(f"{top}/d")
    with pytest.raises(OSError, match="not empty"):
        fs.rmdir(f"{top}/d")
    with pytest.raises(OSError, match="same file"):
        fs.cp_file(f"{top}/d/a", f"{top}/d/a")
    with pytest.raises(NotImplementedError, match="signed"):
        fs.sign(f"{top}/d/a")
    with pytest.raises(ValueError, match="rb, wb, ab or xb"):
        fs.open(f"{top}/d/a", "r+b")
    assert fs.cat(f"{top}/d/a") == b"a"


def test_times_and_keys_tell_a_change(fs: EmberFileSystem, top: str) -> None:
    path = f"{top}/a"
    fs.pipe_file(path, b"one")
    before = (fs.checksum(path), fs.ukey(path))
    assert before == (fs.checksum(path), fs.ukey(path))
    assert abs(datetime.now(UTC) - fs.modified(path)) < timedelta(minutes=1)
    assert fs.created(path) <= datetime.now(UTC) + timedelta(minutes=1)
    fs.pipe_file(path, b"two")
    changed = (fs.checksum(path), fs.ukey(path))
    assert before[0] != changed[0]
    assert before[1] != changed[1]
    fs.touch(path, truncate=False)
    assert (fs.cat(path), fs.ukey(path) != changed[1]) == (b"two", True)
    fs.touch(path)
    assert fs.cat(path) == b""


# ---------------------------------------------------------------- content


def test_files_are_read_and_written_as_python_does(fs: EmberFileSystem, top: str) -> None:
    data = os.urandom(5_000_000)
    path = f"{top}/a"
    with fs.open(path, "wb") as file:
        for start in range(0, len(data), 70_001):
            file.write(data[start : start + 70_001])
        assert file.tell() == len(data)
    with fs.open(path, "ab") as file:
        file.write(b"end")
    with fs.open(path) as file:
        assert (file.size, file.read(), file.read()) == (len(data) + 3, data + b"end", b"")
        assert file.seek(-3, os.SEEK_END) == len(data)
        assert file.read() == b"end"
        file.seek(1234)
        memory = bytearray(2_000_000)
        assert file.readinto(memory) == len(memory)
        assert memory == data[1234 : 1234 + len(memory)]
    assert fs.cat_file(path, -3, None) == b"end"
    assert fs.cat_file(path, 10, -len(data)) == data[10:3]
    assert fs.tail(path, 3) == b"end"
    assert fs.read_block(path, 100, 50) == data[100:150]
    with fs.open(path, "xt" if fs.rm(path) else "wt", encoding="utf-8") as file:
        file.write("zwei\ndrei\n")
    with fs.open(path, "rt", encoding="utf-8") as file:
        assert [line.strip() for line in file] == ["zwei", "drei"]


def address(memory: bytearray | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_large_reads_land_in_the_callers_memory(fs: EmberFileSystem, top: str) -> None:
    fs.pipe_file(f"{top}/a", bytes(8 << 20))
    with fs.open(f"{top}/a") as file:
        taken: list[int] = []
        pread = file.raw._file.pread
        file.raw._file.pread = lambda into, at: (taken.append(address(into)), pread(into, at))[1]
        memory = bytearray(4 << 20)
        assert file.readinto(memory) == len(memory)
        assert taken[0] == address(memory)


def test_ranges_of_many_files(fs: EmberFileSystem, top: str) -> None:
    content = {f"{top}/{n}": os.urandom(20_000 * (n % 3)) for n in range(100)}
    fs.pipe(content)
    assert fs.cat(top, recursive=True) == content
    paths = sorted(content) * 3
    starts = [n * 50 for n in range(300)]
    ends = [start + 5000 for start in starts]
    found = fs.cat_ranges(paths, starts, ends)
    assert found == [content[p][s:e] for p, s, e in zip(paths, starts, ends, strict=True)]
    assert fs.cat_ranges(paths[:3], -5, None) == [content[path][-5:] for path in paths[:3]]
    found = fs.cat_ranges([paths[0], f"{top}/none"], 0, 5)
    assert isinstance(found[1], FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges([f"{top}/none"], 0, 5, on_error="raise")
    with pytest.raises(ValueError, match="2 paths, 1 starts"):
        fs.cat_ranges(paths[:2], [0], [1])


def test_copies_are_equal(fs: EmberFileSystem, top: str, tmp_path: Path) -> None:
    data = os.urandom(20_000_001)
    (tmp_path / "a").write_bytes(data)
    fs.put(str(tmp_path / "a"), f"{top}/a")
    fs.cp(f"{top}/a", f"{top}/new/b")
    fs.get(f"{top}/new/b", str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == data


def test_a_transaction_names_its_files_at_its_end(fs: EmberFileSystem, top: str) -> None:
    fs.pipe_file(f"{top}/a", b"old")
    with fs.transaction:
        with fs.open(f"{top}/a", "wb") as file:
            file.write(b"new")
        with fs.open(f"{top}/deep/b", "xb") as file:
            file.write(b"b")
        assert (fs.cat(f"{top}/a"), fs.exists(f"{top}/deep/b")) == (b"old", False)
    assert (fs.cat(f"{top}/a"), fs.cat(f"{top}/deep/b")) == (b"new", b"b")

    def fail() -> None:
        with fs.transaction:
            fs.open(f"{top}/a", "wb").write(b"newer")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert fs.find(top) == [f"{top}/a", f"{top}/deep/b"]
    assert fs.cat(f"{top}/a") == b"new"


def test_mount_and_fsspec_see_each_other(
    fs: EmberFileSystem, top: str, shared: LocalCluster
) -> None:
    fs.pipe_file(f"{top}/a", b"from fsspec")
    assert (shared.mount / top[1:] / "a").read_bytes() == b"from fsspec"
    (shared.mount / top[1:] / "b").write_bytes(b"from the mount")
    assert fs.cat(f"{top}/b") == b"from the mount"


# ---------------------------------------------------------------- which cluster


def test_urls_options_environment_and_directory_name_a_cluster(
    fs: EmberFileSystem, top: str, place: dict[str, str], shared: LocalCluster
) -> None:
    fs.pipe_file(f"{top}/a", b"a")
    url = fs.unstrip_protocol(f"{top}/a")
    assert url == f"emberfs://{place['mgmtd']}{top}/a"
    with fsspec.open(url, cluster=place["cluster"]) as file:
        assert file.read() == b"a"
    with fsspec.open(f"emberfs://{top}/a", directory=str(shared.directory)) as file:
        assert file.read() == b"a"
    read = "import fsspec, sys; print(fsspec.open(sys.argv[1]).open().read())"
    assert script(shared, read, f"emberfs://{top}/a") == "b'a'\n"


@pytest.mark.parametrize(
    ("url", "options", "text"),
    [
        ("emberfs://data/a", {}, "emberfs:///data"),
        ("emberfs:///a", {"mgmtd": "host"}, "host:port"),
        ("emberfs:///a", {"mgmtd": "host:0"}, "host:port"),
        ("emberfs:///a", {"directory": "/none"}, "/none/cluster.toml is not there"),
    ],
)
def test_a_wrong_name_is_said(url: str, options: dict[str, str], text: str) -> None:
    with pytest.raises((OSError, ValueError), match=re.escape(text)):
        fsspec.open(url, **options)


def test_a_wrong_cluster_is_said(place: dict[str, str]) -> None:
    with pytest.raises(OSError, match="cluster"):
        EmberFileSystem(place["mgmtd"], cluster="another").ls("/")


# ---------------------------------------------------------------- processes and threads


def test_pickled_file_systems_and_files_go_on_elsewhere(
    fs: EmberFileSystem, top: str, shared: LocalCluster
) -> None:
    fs.pipe_file(f"{top}/a", b"0123456789")
    with fs.open(f"{top}/a") as file:
        file.read(4)
        text = pickle.dumps((fs, file)).hex()
    found = script(
        shared,
        """
        import pickle, sys
        fs, file = pickle.loads(bytes.fromhex(sys.argv[1]))
        print(fs.cat(file.path), file.read())
        """,
        text,
    )
    assert found == "b'0123456789' b'456789'\n"
    assert pickle.loads(pickle.dumps(fs)) == fs
    assert hash(pickle.loads(pickle.dumps(fs))) == hash(fs)


def test_many_threads_share_one_connection(fs: EmberFileSystem, top: str) -> None:
    sessions, problems = set(), []

    def work(number: int) -> None:
        try:
            mine = EmberFileSystem(*fs.place)
            sessions.add(session(mine.place))
            for turn in range(5):
                mine.pipe_file(f"{top}/{number}/{turn}", bytes([number]) * 10_000)
                assert mine.cat(f"{top}/{number}/{turn}") == bytes([number]) * 10_000
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (problems, len(sessions), len(fs.find(top))) == ([], 1, 40)


FORKS = """
    import os, signal, sys, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: of threads and fork
    import fsspec
    top, leave = sys.argv[1:]
    fs = fsspec.filesystem("emberfs")
    fs.pipe_file(f"{top}/a", b"0123456789")
    reader, writer = fs.open(f"{top}/a"), fs.open(f"{top}/w", "wb")
    reader.read(2)
    writer.write(b"parent")
    for number in range(3):
        child = os.fork()
        if not child:
            signal.alarm(30)  # a hang must not outlive the test
            fs.pipe_file(f"{top}/child{number}", fs.cat(f"{top}/a"))
            assert reader.read(3) == b"234"
            try:
                writer.raw.write(b"child")
            except OSError as problem:
                assert "another process" in str(problem), problem
            else:
                sys.exit("the child wrote")
            grandchild = os.fork()
            if not grandchild:
                signal.alarm(20)
                fs.pipe_file(f"{top}/grandchild{number}", b"g")
                os._exit(0)
            assert os.waitpid(grandchild, 0)[1] == 0
            os._exit(0) if leave == "_exit" else sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert reader.read() == b"23456789"
    writer.close()
    assert fs.cat(f"{top}/w") == b"parent"
    print(len(fs.ls(top)))
"""


@pytest.mark.parametrize("leave", ["_exit", "exit"])
def test_forked_children_work_on(
    fs: EmberFileSystem, top: str, shared: LocalCluster, leave: str
) -> None:
    assert script(shared, FORKS, top, leave) == "8\n"
    assert fs.cat(f"{top}/child2") == b"0123456789"
    wait_until(lambda: not relays(shared), 10)


def relays(cluster: LocalCluster) -> list[Path]:
    """Processes that speak gRPC for forked children of this cluster's clients."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if b"ecosystem.relay" in text and cluster.plan.mgmtd_address.encode() in text:
            found.append(path)
    return found


def test_an_unclosed_file_of_an_ending_process_is_written(
    fs: EmberFileSystem, top: str, shared: LocalCluster
) -> None:
    text = """
        import fsspec, sys
        file = fsspec.filesystem("emberfs").open(sys.argv[1], "wb")
        file.write(b"kept")
        file.flush()
        del file
    """
    script(shared, text, f"{top}/a")
    assert fs.cat(f"{top}/a") == b"kept"
