"""Chunk store of one target: each figure beside its limit on the same disk, in the same run.

python bench/bench_chunks.py [--path DIRECTORY] [--mib 256] [--seconds 1.0]
"""

import argparse
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from emberfs.proto.ids import ChunkId, InodeId, KiB, MiB, pack_chunk_id
from emberfs.proto.storage_calls import UpdateKind
from emberfs.runtime.real import RealEnv
from emberfs.storage.chunks import ChunkStore


def report(name: str, figure: float, limit: float, unit: str, what: str) -> None:
    print(
        f"{name:34} {figure:10.0f} {unit}   limit {limit:10.0f}   ratio {figure / limit:5.2f}"
        f"   ({what})"
    )


def rate(work: Callable[[], None], seconds: float) -> float:
    """Calls per second; best of three."""
    best = 0.0
    for _ in range(3):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds / 3:
            work()
            count += 1
        best = max(best, count / (time.perf_counter() - start))
    return best


def written_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


class Versions:
    """Writes through a store, counting versions itself."""

    def __init__(self, store: ChunkStore) -> None:
        self.store = store
        self.versions: dict[ChunkId, int] = {}

    def write(self, chunk: ChunkId, offset: int, data: memoryview) -> None:
        version = self.versions.get(chunk, 0) + 1
        self.store.prepare_and_commit(
            chunk, UpdateKind.WRITE, version=version, offset=offset, length=len(data),
            data=data, chunk_bytes=MiB, remembered=(),
        )  # fmt: skip
        self.versions[chunk] = version


def bench_fill(versions: Versions, chunks: list[ChunkId], raw: int, data: memoryview) -> None:
    """Fresh chunks against plain pwrite into preallocated space, in turns of 16 MiB."""
    os.posix_fallocate(raw, 0, len(chunks) * MiB)
    times = dict.fromkeys(("raw", "raw synced", "store", "store synced"), 0.0)
    for first in range(0, len(chunks), 16):
        turn = range(first, min(first + 16, len(chunks)))
        start = time.perf_counter()
        for index in turn:
            os.pwrite(raw, data, index * MiB)
        times["raw"] += time.perf_counter() - start
        os.fdatasync(raw)
        times["raw synced"] += time.perf_counter() - start
        start = time.perf_counter()
        for index in turn:
            versions.write(chunks[index], 0, data)
        times["store"] += time.perf_counter() - start
        versions.store.flush()
        times["store synced"] += time.perf_counter() - start
    rates = {name: len(chunks) / spent for name, spent in times.items()}
    report("write 1 MiB, not synced", rates["store"], rates["raw"], "MiB/s", "pwrite")
    what = "pwrite, fdatasync"
    report("write 1 MiB, flush every 16", rates["store synced"], rates["raw synced"], "MiB/s", what)


def bench_reads(
    store: ChunkStore, chunks: list[ChunkId], raw: int, size: int, seconds: float
) -> None:
    dice = random.Random(1)
    sink = memoryview(bytearray(size))
    places = [(n, dice.randrange(MiB // size) * size) for n in range(len(chunks))]
    dice.shuffle(places)
    at = 0

    def through() -> None:
        nonlocal at
        at = (at + 1) % len(places)
        index, offset = places[at]
        found = store.try_read_into(chunks[index], version=0, offset=offset, length=size, sink=sink)
        if found is None:
            store.read_into(chunks[index], version=0, offset=offset, length=size, sink=sink)

    def plain() -> None:
        nonlocal at
        at = (at + 1) % len(places)
        index, offset = places[at]
        os.preadv(raw, [sink], index * MiB + offset)

    figure, limit = rate(through, seconds), rate(plain, seconds)
    report(f"read {size // KiB} KiB random, cached", figure, limit, "/s", "preadv loop, no checks")


def bench_small_writes(versions: Versions, chunks: list[ChunkId], seconds: float) -> None:
    dice = random.Random(2)
    page = memoryview(random.Random(3).randbytes(4 * KiB))
    before, count = written_bytes(), 0
    flushing = threading.Thread()

    def one() -> None:
        nonlocal count, flushing
        versions.write(dice.choice(chunks), dice.randrange(256) * 4 * KiB, page)
        count += 1
        if versions.store.need_flush and not flushing.is_alive():
            flushing = threading.Thread(target=versions.store.flush)
            flushing.start()

    figure = rate(one, seconds)
    if flushing.is_alive():
        flushing.join()
    versions.store.flush()
    amplification = (written_bytes() - before) / (count * 4 * KiB)
    print(f"{'overwrite 4 KiB random, no sync':34} {figure:10.0f} /s")
    print(f"{'physical bytes per logical':34} {amplification:10.2f}      limit       3.00")
    for _ in range(2):
        start, flushes = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 2:
            for _ in range(32):
                one()
            versions.store.flush()
            flushes += 1
    synced = flushes * 32 / (time.perf_counter() - start)
    print(f"{'overwrite 4 KiB, flush every 32':34} {synced:10.0f} /s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", default=None, help="directory on the disk to measure")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="bench-chunks-", dir=arguments.path)
    raw = os.open(f"{directory}/raw", os.O_RDWR | os.O_CREAT)
    store = ChunkStore.open(RealEnv(), f"{directory}/target")
    try:
        chunks = [pack_chunk_id(InodeId(1), n) for n in range(arguments.mib)]
        versions = Versions(store)
        bench_fill(versions, chunks, raw, memoryview(random.Random(0).randbytes(MiB)))
        bench_reads(store, chunks, raw, MiB, arguments.seconds)
        bench_reads(store, chunks, raw, 4 * KiB, arguments.seconds)
        bench_small_writes(versions, chunks, arguments.seconds)
        findings = store.check().findings
        assert not findings, findings
    finally:
        store.close()
        os.close(raw)
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
