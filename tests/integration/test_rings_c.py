"""The C library: built as its users build it, and run against a real mount."""

from pathlib import Path

import pytest

from integration.harness import LocalCluster, run, wait_until

HERE = Path(__file__).parent
TOTAL = 3_000_000


@pytest.mark.parametrize("flags", ["", "-fsanitize=address,undefined -g"])
def test_a_c_program(shared: LocalCluster, tmp_path: Path, flags: str) -> None:
    place = shared.mount / "pattern"
    place.write_bytes(bytes(i * 131 % 251 for i in range(TOTAL)))
    run(HERE.parent.parent / "deploy" / "build_library.sh", tmp_path)
    program = tmp_path / "program"
    library = tmp_path / "lib"
    run(
        "cc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", *flags.split(),
        HERE / "ring_program.c", f"-I{tmp_path}/include",
        *([HERE.parent.parent / "client/native/emberfs.c"] if flags else []),
        *([] if flags else [f"-L{library}", "-lemberfs", f"-Wl,-rpath,{library}"]),
        "-pthread", "-o", program,
    )  # fmt: skip
    assert run(program, place, TOTAL, timeout_s=90).stdout == "ok\n"
    before = fds_of(shared)
    assert run(program, place, TOTAL, timeout_s=90).stdout == "ok\n"
    wait_until(lambda: fds_of(shared) <= before, 10)


def fds_of(cluster: LocalCluster) -> int:
    return len(list(Path(f"/proc/{cluster.pid('fuse')}/fd").iterdir()))


def test_only_its_own_names_are_exported(tmp_path: Path) -> None:
    run(HERE.parent.parent / "deploy" / "build_library.sh", tmp_path)
    lines = run("nm", "-D", "--defined-only", tmp_path / "lib/libemberfs.so.0").stdout.splitlines()
    names = [line.split()[2] for line in lines]
    assert len(names) == 13
    assert all(name.startswith("emberfs_") for name in names)
