"""Tests of runtime: config errors, files, tasks, backoff, checksums."""

import asyncio
import os
import random
import threading
import time
from pathlib import Path

import msgspec
import pytest

from emberfs.proto.errors import MEANINGS, Code, EmberfsError
from emberfs.runtime.checksum import crc32c_blocks, crc32c_blocks_twin
from emberfs.runtime.config import load_config
from emberfs.runtime.real import RealEnv
from emberfs.runtime.retry import Backoff
from emberfs.runtime.tasks import TaskSet


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cluster: str
    lease_s: float = 5.0


def problem_of(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(EmberfsError) as caught:
        load_config(path, Sample)
    assert caught.value.code == Code.CONFIG
    return caught.value.message


def test_every_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(Code)


def test_config_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('cluster = "x"\nlease_s = 2\n')
    assert load_config(path, Sample) == Sample(cluster="x", lease_s=2.0)


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    message = problem_of(tmp_path / "a.toml", 'cluster = "x"\nleese_s = 2\n')
    assert 'did you mean "lease_s"?' in message


def test_corrupt_toml_and_wrong_type_and_missing_file(tmp_path: Path) -> None:
    assert "not valid TOML" in problem_of(tmp_path / "a.toml", "cluster = ")
    assert "lease_s" in problem_of(tmp_path / "b.toml", 'cluster = "x"\nlease_s = "two"\n')
    assert "cluster" in problem_of(tmp_path / "c.toml", "")
    with pytest.raises(EmberfsError, match="no such file"):
        load_config(tmp_path / "none.toml", Sample)


@pytest.mark.parametrize("size", [0, 1, 7, 4095, 4096, 4097, 16384, 70001])
@pytest.mark.parametrize("block_bytes", [1, 13, 4096, 65536])
def test_block_checksums_equal_their_twin(size: int, block_bytes: int) -> None:
    if size // block_bytes > 20000:
        size = 20000 * block_bytes
    data = random.Random(size).randbytes(size)
    assert crc32c_blocks(data, block_bytes) == crc32c_blocks_twin(data, block_bytes)


def test_known_checksum() -> None:
    # RFC 3720 B.4: 32 bytes of zeros.
    assert crc32c_blocks(bytes(32)) == (0x8A9136AA).to_bytes(4, "little")


def test_file_reads_what_was_written(tmp_path: Path) -> None:
    disk = RealEnv().disk
    file = disk.open(str(tmp_path / "f"), create=True)
    file.allocate(0, 8192)
    file.write([memoryview(b"abc"), memoryview(b""), memoryview(b"defg")], 4000)
    view = memoryview(bytearray(10))
    assert file.read_into(view, 4000) == 10
    assert bytes(view) == b"abcdefg\0\0\0"
    assert file.read_cached_into(view, 8190) in (2, -1)
    assert file.read_into(view, 8190) == 2
    file.datasync()
    file.close()


def test_lock_excludes(tmp_path: Path) -> None:
    disk = RealEnv().disk
    release = disk.lock(str(tmp_path / "lock"))
    with pytest.raises(BlockingIOError):
        disk.lock(str(tmp_path / "lock"))
    release()
    disk.lock(str(tmp_path / "lock"))()


def test_replace_small_leaves_no_other_name(tmp_path: Path) -> None:
    disk = RealEnv().disk
    disk.replace_small(str(tmp_path / "f"), b"1")
    disk.replace_small(str(tmp_path / "f"), b"2")
    assert os.listdir(tmp_path) == ["f"]
    assert disk.read_small(str(tmp_path / "f")) == b"2"


def test_tasks_are_cancelled_by_their_owner() -> None:
    async def body() -> None:
        tasks = TaskSet()
        task = tasks.spawn(asyncio.sleep(60), name="sleeper")
        await asyncio.sleep(0)
        await tasks.close()
        assert task.cancelled()
        assert len(tasks) == 0

    asyncio.run(body())


def test_a_failed_task_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("seen")

    async def body() -> None:
        tasks = TaskSet()
        tasks.spawn(fail(), name="unlucky")
        await tasks.drain()

    asyncio.run(body())
    assert "unlucky" in caplog.text


def test_backoff_doubles_to_its_bound() -> None:
    class Highest:
        def uniform(self, a: float, b: float) -> float:
            return b

    backoff = Backoff(10, 35)
    assert [backoff.next_ns(Highest()) for _ in range(4)] == [10, 20, 35, 35]
    backoff.reset()
    assert backoff.next_ns(Highest()) == 10


def test_a_cancelled_caller_waits_for_its_thread() -> None:
    async def body() -> None:
        env, ended = RealEnv(), threading.Event()

        def work() -> None:
            time.sleep(0.2)
            ended.set()

        task = asyncio.get_running_loop().create_task(env.run_blocking(work))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(body())


def test_punched_space_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "f"
    file = RealEnv().disk.open(str(path), create=True)
    file.write([memoryview(bytes([7]) * (1 << 20))], 0)
    file.datasync()
    before = path.stat().st_blocks
    file.punch(0, 1 << 19)
    assert path.stat().st_size == 1 << 20
    assert path.stat().st_blocks < before
    view = memoryview(bytearray(2))
    file.read_into(view, (1 << 19) - 1)
    assert bytes(view) == b"\0\7"
    file.close()
