"""Programs of a user, each in a process of its own, as texts or out of the documentation."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from integration.harness import LocalCluster

PYTHON_DOCS = Path(__file__).resolve().parents[2] / "docs" / "python.md"
_BLOCK = re.compile(r"^## (?P<title>.+?)$|^```python\n(?P<text>.*?)^```$", re.M | re.S)


def script(cluster: LocalCluster, text: str, *arguments: str, timeout_s: float = 60) -> str:
    """Run a program that finds the cluster through the environment; what it prints."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("EMBERFS_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments],
        env=environ | {"EMBERFS_DIRECTORY": str(cluster.directory), "MOUNT": str(cluster.mount)},
        cwd=cluster.root,  # not that of the sources, whose metadata may be of another build
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def documented(path: Path = PYTHON_DOCS) -> dict[str, str]:
    """The Python of a document: one program per section, of all its blocks."""
    found: dict[str, str] = {}
    title = ""
    for match in _BLOCK.finditer(path.read_text()):
        title = match["title"] or title
        if match["text"]:
            found[title] = found.get(title, "") + match["text"]
    return found


def needed(text: str) -> list[str]:
    """The big packages that a program imports."""
    names = ("torch", "pandas", "pyarrow", "duckdb")
    return [name for name in names if re.search(rf"^\s*(import|from) {name}\b", text, re.M)]
