"""SGLang's client for 3FS as released, on a mount: DIRECTORY.

Only its own files are loaded; the packages around them would ask for a GPU.
"""

import importlib
import multiprocessing.shared_memory  # noqa: F401 - SGLang uses it without importing it
import sys
import threading
import types
from pathlib import Path
from typing import Any

import torch

PAGE_BYTES = 64 << 10
ENTRIES = 8
FILE_BYTES = 1 << 40  # SGLang's own default; a sparse file
CLIENTS = 4


def load_client() -> Any:
    """Import the client without running the package files above it."""
    (root,) = {Path(entry, "sglang") for entry in sys.path if Path(entry, "sglang").is_dir()}
    for name in ("", ".srt", ".srt.mem_cache", ".srt.mem_cache.storage", ".srt.utils"):
        module = types.ModuleType(f"sglang{name}")
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[module.__name__] = module
    module = types.ModuleType("sglang.srt.mem_cache.storage.hf3fs")
    module.__path__ = [str(root / "srt" / "mem_cache" / "storage" / "hf3fs")]
    sys.modules[module.__name__] = module
    return importlib.import_module("sglang.srt.mem_cache.storage.hf3fs.hf3fs_usrbio_client")


def pages(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (PAGE_BYTES,), dtype=torch.uint8, generator=generator)
        for _ in range(ENTRIES)
    ]


def use(client: Any, number: int, problems: list[str]) -> None:
    """Write and read pages far apart in the one file, each client its own."""
    for batch in range(20):
        offsets = [
            ((i * 7919 + batch * 104_729) * CLIENTS + number)
            % (FILE_BYTES // PAGE_BYTES)
            * PAGE_BYTES
            for i in range(ENTRIES)
        ]
        written, read = (
            pages(number * 1000 + batch),
            [torch.zeros(PAGE_BYTES, dtype=torch.uint8) for _ in range(ENTRIES)],
        )
        if client.batch_write(offsets, written) != [PAGE_BYTES] * ENTRIES:
            problems.append(f"client {number}, batch {batch}: short write")
        if client.batch_read(offsets, read) != [PAGE_BYTES] * ENTRIES:
            problems.append(f"client {number}, batch {batch}: short read")
        if not all(torch.equal(a, b) for a, b in zip(written, read, strict=True)):
            problems.append(f"client {number}, batch {batch}: other data")
    client.flush()


def main() -> None:
    module = load_client()
    assert module.HF3FS_AVAILABLE
    path = str(Path(sys.argv[1], "hicache.0.bin"))
    clients = [
        module.Hf3fsUsrBioClient(path, FILE_BYTES, PAGE_BYTES, ENTRIES, client_timeout=30)
        for _ in range(CLIENTS)
    ]
    problems: list[str] = []
    threads = [
        threading.Thread(target=use, args=(client, number, problems))
        for number, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    empty = [torch.ones(PAGE_BYTES, dtype=torch.uint8)]
    assert clients[0].batch_read([FILE_BYTES - PAGE_BYTES], empty) == [PAGE_BYTES]
    assert not empty[0].any(), "what was never written reads as zeros"
    for client in clients:
        client.close()
    assert not problems, problems


main()
