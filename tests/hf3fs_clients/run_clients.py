"""Programs made for 3FS, unmodified from the package index, on a real cluster of ours.

usage: run_clients.py [DIRECTORY]     Virtual environment and clients go there (2 GB) and are kept;
without it they are in a temporary directory. Needs the network and gcc, g++.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from hf3fs_library import SOURCE  # noqa: E402
from integration.harness import local_cluster  # noqa: E402

CLIENTS = {
    "fastsafetensors_client.py": "fastsafetensor-3fs-reader 0.3.3, fastsafetensors 0.5.0",
    "sglang_client.py": "SGLang 0.5.23",
    "lmcache_client.py": "LMCache 0.5.6",
}
# The clients themselves come without their dependencies: those would bring a GPU's world along.
UNMODIFIED = (
    "sglang==0.5.23",
    "lmcache==0.5.6",
    "fastsafetensor-3fs-reader==0.3.3",
    "fastsafetensors==0.5.0",
)
NEEDED = """
torch==2.13.0 numpy<2.4 safetensors ninja setuptools orjson requests fastapi psutil msgspec
prometheus_client aiofile aiofiles blake3 cachetools pyyaml pyzmq py-cpuinfo sortedcontainers nvtx
opentelemetry-api opentelemetry-sdk opentelemetry-exporter-prometheus redis httpx aiohttp numba
transformers cryptography
""".split()  # noqa: SIM905
TIMEOUT_S = 900


def install(directory: Path) -> Path:
    """A virtual environment with the clients and our layer; returns its python."""
    python = directory / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, *NEEDED], check=True)
    subprocess.run([*pip, "--no-deps", *UNMODIFIED], check=True)
    copy = directory / "hf3fs"
    subprocess.run(["rm", "-rf", copy], check=True)
    subprocess.run(["cp", "-r", SOURCE, copy], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", copy], check=True)
    return python


def run_all(python: Path, directory: Path) -> int:
    """Run every client; returns how many failed."""
    failed = 0
    left = directory / "left"  # what the clients compile and count stays out of the user's home
    environment = {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(left / "extensions"),
        "PROMETHEUS_MULTIPROC_DIR": str(left / "prometheus"),
    }
    (left / "prometheus").mkdir(parents=True, exist_ok=True)
    with local_cluster() as cluster:
        cluster.up()
        for script, name in CLIENTS.items():
            place = cluster.mount / script.removesuffix(".py")
            place.mkdir()
            began_s = time.monotonic()
            done = subprocess.run(
                [python, HERE / script, place, cluster.mount],
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            ok = done.returncode == 0
            took_s = time.monotonic() - began_s
            print(f"{'ok    ' if ok else 'FAILED'} {name} ({took_s:.0f} s)", flush=True)
            if not ok:
                failed += 1
                print(done.stdout, done.stderr, sep="\n")
        cluster.fsck()
    return failed


def main() -> None:
    """Install, run, exit with 1 if a client failed."""
    if len(sys.argv) > 1:
        directory = Path(sys.argv[1]).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        sys.exit(run_all(install(directory), directory) > 0)
    with tempfile.TemporaryDirectory(prefix="hf3fs-clients-") as temporary:
        sys.exit(run_all(install(Path(temporary)), Path(temporary)) > 0)


if __name__ == "__main__":
    main()
