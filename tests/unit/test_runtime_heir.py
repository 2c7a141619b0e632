"""env.bequeath on the real machine: words are carried out after a death, and only then."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MODULE = "import sys, pathlib\npathlib.Path(sys.argv[1]).write_text('heard')\n"
MORTAL = """
import sys, threading, time
from emberfs.runtime.real import RealEnv
env = RealEnv()
for words in sys.argv[1:]:
    env.bequeath("heir_of_test", words)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


def mortal(directory: Path, *words: str) -> subprocess.Popen[str]:
    (directory / "heir_of_test.py").write_text(MODULE)
    process = subprocess.Popen(
        [sys.executable, "-c", MORTAL, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(directory)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str], number: int) -> None:
    if number:
        process.send_signal(number)
    process.communicate(timeout=20)


def heard(path: Path, seconds: float) -> bool:
    end_s = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end_s:
        time.sleep(0.01)
    return path.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, 0])
def test_the_last_words_are_carried_out_after_death(tmp_path: Path, number: int) -> None:
    first, last = tmp_path / "first", tmp_path / "last"
    process = mortal(tmp_path, str(first), str(last))
    assert not heard(last, 0.2), "it lives"
    end(process, number)
    assert heard(last, 20)
    assert not first.exists(), "it has changed its mind"


def test_what_was_taken_back_is_not_said(tmp_path: Path) -> None:
    file = tmp_path / "said"
    end(mortal(tmp_path, str(file), ""), signal.SIGKILL)
    assert not heard(file, 0.5)


def test_a_frozen_process_is_not_dead(tmp_path: Path) -> None:
    file = tmp_path / "said"
    process = mortal(tmp_path, str(file))
    process.send_signal(signal.SIGSTOP)
    try:
        assert not heard(file, 0.5)
    finally:
        end(process, signal.SIGKILL)
    assert heard(file, 20)
