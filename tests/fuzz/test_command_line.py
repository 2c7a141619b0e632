"""Arguments of `emberfs`: bad ones end with status 2 (usage) or 1 and one line; nothing starts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from emberfs.deploy import cli
from fuzz.profile import budget

WRONG = {
    "an unknown command": ["nonsense"],
    "a word for a number": ["up", "--storages", "abc"],
    "no storage": ["up", "--storages", "0"],
    "no replica": ["up", "--replicas", "0"],
    "less than none": ["up", "--storages", "-1"],
    "a port above all": ["up", "--base-port", "70000"],
    "a port below all": ["up", "--base-port", "-5"],
    "a huge number": ["up", "--storages", "9" * 30],
    "an unknown option": ["status", "--colour", "red"],
}
BROKEN_PLANS = [b"\xff\xfe", b"storages = nan", b"x = [" + b"[" * 5000, b'directory = "a\\u0000"']


def call(arguments: list[str]) -> tuple[int, str]:
    found = CliRunner().invoke(cli.app, arguments)
    crash = found.exception
    assert crash is None or isinstance(crash, SystemExit), f"{arguments}: {crash!r}"
    return found.exit_code, found.output


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_usage_errors(name: str, tmp_path: Path) -> None:
    """Status 2, and no directory of a cluster is made."""
    place = tmp_path / "cluster"
    arguments = WRONG[name]
    if arguments[0] == "up":
        arguments = [*arguments, "-d", str(place)]
    status, _ = call(arguments)
    assert status == 2
    assert not place.exists()


@pytest.mark.parametrize("command", ["up", "down", "status", "doctor", "mount", "umount", "fsck"])
@pytest.mark.parametrize("plan", BROKEN_PLANS, ids=range(len(BROKEN_PLANS)))
def test_a_broken_plan_is_one_line(command: str, plan: bytes, tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_bytes(plan)
    status, output = call([command, "-d", str(tmp_path)])
    assert status == (2 if command == "fsck" else 1)  # fsck: it could not check
    assert output.count("\n") == 1
    assert "cluster.toml" in output


def test_any_words_end_without_a_traceback(tmp_path: Path) -> None:
    words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=10)

    @budget(60)
    @given(st.lists(words | st.sampled_from(("status", "-d", "--force", "fsck")), max_size=4))
    def tried(arguments: list[str]) -> None:
        if not {"up", "mount", "clean-data"} & set(arguments):
            status, _ = call([*arguments, "--directory", str(tmp_path / "none")])
            assert status != 0 or "--help" in arguments

    tried()
