"""The programs of docs/python.md, run as they stand."""

import pytest

from integration.harness import LocalCluster
from integration.scripts import documented, needed, script

PROGRAMS = documented()


@pytest.mark.parametrize("title", PROGRAMS)
def test_a_documented_program_works(shared: LocalCluster, title: str) -> None:
    for name in needed(PROGRAMS[title]):
        pytest.importorskip(name, reason=f"{name} is missing: `make test-ecosystem` installs it")
    script(shared, "if __name__ == '__main__':\n" + indented(PROGRAMS[title]), timeout_s=120)


def indented(text: str) -> str:
    return "".join(f"    {line}" if line.strip() else line for line in text.splitlines(True))


def test_all_programs_are_found() -> None:
    assert {"Files", "pandas and pyarrow", "DuckDB", "Training samples", "Checkpoints"} == set(
        PROGRAMS
    )
