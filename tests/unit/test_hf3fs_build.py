"""What the compatibility layer for programs of 3FS consists of, without a mount."""

import ctypes
import errno
import importlib
import os
import re
import shutil
import subprocess
import sys
import uuid
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest

from hf3fs_library import SOURCE, compile_program, installed, library


def words(text: str) -> list[str]:
    return text.split()


CALLS = words("""
is_hf3fs extract_mount_point iovcreate iovopen iovunlink iovdestroy iovwrap ior_size iorcreate
iorcreate2 iorcreate3 iorcreate4 iordestroy reg_fd dereg_fd io_entries prep_io submit_ios
wait_for_ios hardlink punchhole
""")
CALLS_OF_GPUS = words("""
gdr_available gdr_device_count iovcreate_device iovopen_device iovwrap_device iov_mem_type
iov_device_id iovsync
""")

LAYOUT = r"""
#include <hf3fs_usrbio.h>
#include <stdio.h>
#define SAY(type, member) \
  printf("%s.%s %zu\n", #type, #member, offsetof(struct hf3fs_##type, member))
int main(void) {
  printf("iov %zu\nior %zu\ncqe %zu\n", sizeof(struct hf3fs_iov), sizeof(struct hf3fs_ior),
         sizeof(struct hf3fs_cqe));
  SAY(iov, base); SAY(iov, iovh); SAY(iov, id); SAY(iov, mount_point); SAY(iov, size);
  SAY(iov, block_size); SAY(iov, numa);
  SAY(ior, iov); SAY(ior, iorh); SAY(ior, mount_point); SAY(ior, for_read); SAY(ior, io_depth);
  SAY(ior, priority); SAY(ior, timeout); SAY(ior, flags);
  SAY(cqe, index); SAY(cqe, reserved); SAY(cqe, result); SAY(cqe, userdata);
  printf("size %zu\nmagic %x\n", hf3fs_ior_size(8), HF3FS_SUPER_MAGIC);
  printf("gpu %d %d %d\n", hf3fs_gdr_available(), hf3fs_gdr_device_count(), HF3FS_MEM_DEVICE);
  return 0;
}
"""
LAYOUT_SAID = """\
iov 312 ior 600 cqe 24
iov.base 0 iov.iovh 8 iov.id 16 iov.mount_point 32 iov.size 288 iov.block_size 296 iov.numa 304
ior.iov 0 ior.iorh 312 ior.mount_point 320 ior.for_read 576 ior.io_depth 580 ior.priority 584
ior.timeout 588 ior.flags 592 cqe.index 0 cqe.reserved 4 cqe.result 8 cqe.userdata 16
size 5008 magic 8f3f5fff gpu 0 0 1
"""


@pytest.fixture(scope="module")
def native() -> ModuleType:
    installed()
    return importlib.import_module("hf3fs_py_usrbio")


@pytest.fixture(scope="module")
def io() -> ModuleType:
    installed()
    return importlib.import_module("hf3fs_fuse.io")


def said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_exactly_the_known_symbols_are_exported() -> None:
    lines = said("nm", "-D", "--defined-only", library()).splitlines()
    names = [line.split()[-1] for line in lines]
    assert sorted(names) == sorted(f"hf3fs_{name}" for name in CALLS + CALLS_OF_GPUS)
    assert len(CALLS) == 21
    assert not [name for name in names if "@" in name], "symbols carry no version"


def test_name_and_needs_of_the_library() -> None:
    dynamic = said("readelf", "-d", library())
    assert re.findall(r"SONAME.*\[(.*)\]", dynamic) == ["libhf3fs_api_shared.so"]
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    loader = {name for name in needed if name.startswith("ld-linux")}  # of the C library, for TLS
    assert needed - loader <= {"libc.so.6", "libpthread.so.0"}


@pytest.mark.parametrize(
    ("compiler", "standard"), [("gcc", "c11"), ("gcc", "c99"), ("g++", "c++17")]
)
def test_the_header_compiles_and_has_the_layout(
    tmp_path: Path, compiler: str, standard: str
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"NOT TESTED: {compiler} is not installed here")
    source = tmp_path / ("layout.c" if compiler == "gcc" else "layout.cpp")
    source.write_text(LAYOUT)
    program = compile_program(source, tmp_path / "layout", f"-std={standard}", compiler=compiler)
    assert said(program).split() == LAYOUT_SAID.split()


def test_ctypes_structs_match_the_header(native: ModuleType) -> None:
    described = importlib.import_module("hf3fs_py_usrbio._library")
    sizes = [ctypes.sizeof(each) for each in (described.Iov, described.Ior, described.Cqe)]
    assert sizes == [312, 600, 24]
    assert (described.Iov.numa.offset, described.Ior.flags.offset) == (304, 592)


def test_the_installation_is_one_of_its_own() -> None:
    top = {path.name for path in installed().iterdir()}
    assert top == {"hf3fs_fuse", "hf3fs_py_usrbio", "emberfs_hf3fs-0.1.0.dist-info"}
    assert not list(SOURCE.rglob("*.so")), "building leaves the sources alone"


def test_the_five_names_that_clients_look_for(io: ModuleType, native: ModuleType) -> None:
    for name in words("deregister_fd extract_mount_point make_ioring make_iovec register_fd"):
        assert callable(getattr(io, name))
    assert callable(native.extract_mount_point)
    assert (io.IorPriority.HIGH, io.IorPriority.NORMAL, io.IorPriority.LOW) == (-1, 0, 1)
    assert io.ioring.size_for_entries(8) == native.ioring.size_for_entries(8) == 5008


def test_slices_of_a_buffer(native: ModuleType) -> None:
    memory = bytearray(range(100))
    root = native.iovec(memory, str(uuid.uuid4()), "/mnt/x")
    part = root[10:20]
    assert type(part) is type(root)
    assert (root.base_off, part.base_off, part[2:4].base_off) == (0, 10, 12)
    assert (part.result, part.userdata) == (0, None)
    view = memoryview(part)
    assert (view.format, view.ndim, view.readonly, len(view)) == ("B", 1, False, 10)
    view[0] = 200
    assert memory[10] == 200
    assert bytes(root[95:]) == bytes(range(95, 100))
    assert len(memoryview(root[50:20])) == 0
    with pytest.raises(ValueError, match="step"):
        root[::2]
    with pytest.raises(TypeError):
        root[3]
    with pytest.raises(TypeError):
        root[0:1] = b"x"
    with pytest.raises(TypeError):
        len(root)


def test_a_part_by_a_view_of_it(native: ModuleType) -> None:
    memory = bytearray(100)
    root = native.iovec(memory, str(uuid.uuid4()), "/mnt/x")
    assert root.slice_by(memoryview(memory)[30:50]).base_off == 30
    with pytest.raises(IndexError):
        root[:40].slice_by(memoryview(memory)[30:50])
    with pytest.raises(IndexError):
        root.slice_by(bytearray(10))


def test_a_buffer_keeps_no_export(native: ModuleType) -> None:
    memory = bytearray(100)
    root = native.iovec(memory, str(uuid.uuid4()), "/mnt/x")
    part = root[5:9]
    memory.extend(b"more")  # BufferError while anybody holds an export
    assert part.base_off == 5


def test_bad_arguments_of_buffers_and_rings(native: ModuleType, io: ModuleType) -> None:
    with pytest.raises(ValueError):
        native.iovec(bytearray(8), "no uuid", "/mnt/x")
    with pytest.raises(ValueError, match="writable"):
        native.iovec(b"constant", str(uuid.uuid4()), "/mnt/x")
    with pytest.raises(OSError, match="Invalid argument"):
        native.iovec(bytearray(8), str(uuid.uuid4()), "x" * 256)
    for arguments, expected in [
        (("/nonexistent", 8), errno.ENOENT),
        (("/", 8), errno.ENOENT),
        (("", 8), errno.EINVAL),
        (("/", 0), errno.EINVAL),
        (("/", -1), errno.EINVAL),
        (("/", 8, True, 9), errno.EINVAL),
    ]:
        with pytest.raises(OSError) as caught:
            io.make_ioring(*arguments)
        assert caught.value.errno == expected, arguments
    with pytest.raises(OSError) as caught:
        io.make_ioring("/", 8, timeout=-1)
    assert caught.value.errno == errno.EINVAL


def test_paths_elsewhere(native: ModuleType, tmp_path: Path) -> None:
    assert native.extract_mount_point(str(tmp_path)) is None
    assert native.extract_mount_point(path="/proc/self") is None
    with pytest.raises(RuntimeError):
        native.extract_mount_point(str(tmp_path / "nothing"))


def test_only_files_of_ours_are_registered(native: ModuleType, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        with pytest.raises(OSError) as caught:
            native.register_fd(file.fileno())
        assert caught.value.errno == errno.EBADF
        native.deregister_fd(file.fileno())
    for number in (-1, 1 << 20, 2**31 - 1):
        with pytest.raises(OSError) as caught:
            native.register_fd(number, flags=0)
        assert caught.value.errno == errno.EBADF
        native.deregister_fd(number)
    native.deregister_fd(-(2**31))


def test_timeouts_are_timedelta_or_float(native: ModuleType) -> None:
    rings = importlib.import_module("hf3fs_py_usrbio._rings")
    assert rings._deadline_ns(None) is None
    assert rings._deadline_ns(float("inf")) is None
    assert rings._deadline_ns(timedelta(days=400_000)) is None
    assert rings._deadline_ns(-5.0) <= rings._now_ns()
    ahead_ns = rings._deadline_ns(timedelta(seconds=2)) - rings._now_ns()
    assert 1_900_000_000 < ahead_ns <= 2_000_000_000
    for wrong in (5, True, "1"):
        with pytest.raises(TypeError, match="timedelta"):
            rings._deadline_ns(wrong)


def test_holes_need_as_many_starts_as_ends(native: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    for start, end in [([1], []), ([0] * 1001, [0] * 1001)]:
        with pytest.raises(RuntimeError, match="size not equal"):
            native.punch_hole(filename=str(path), start=start, end=end)
    with pytest.raises(TypeError, match="needs a path"):
        native.punch_hole(start=[0], end=[1])
    with pytest.raises(OSError) as caught:  # not on a mount of ours
        native.punch_hole(str(path), [0], [1])
    assert caught.value.errno == errno.EBADF


def test_other_helpers(native: ModuleType, tmp_path: Path) -> None:
    mounted = importlib.import_module("hf3fs_fuse.fuse")
    assert mounted.get_mount_point("/proc/1/../1/x") == "/proc/1"
    path = tmp_path / "file"
    path.write_bytes(b"x")
    native.hardlink(str(path), str(tmp_path / "second"))
    assert path.stat().st_nlink == 2
    with pytest.raises(FileExistsError):
        native.hardlink(target=str(path), link_name=str(tmp_path / "second"))
    with path.open("rb") as file:
        assert native.force_fsync(file.fileno()) == 0
    assert native.force_fsync(-1) == -1


def test_the_library_missing_is_told(tmp_path: Path) -> None:
    """Who copied only the Python files hears what to do."""
    package = tmp_path / "hf3fs_py_usrbio"
    package.mkdir()
    for path in (installed() / "hf3fs_py_usrbio").glob("*.py"):
        (package / path.name).write_text(path.read_text())
    done = subprocess.run(
        [sys.executable, "-c", "import hf3fs_py_usrbio._library"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "make hf3fs" in done.stderr
