"""Records of emberfs.client.ecosystem.torch on a real cluster, in programs of their own."""

from pathlib import Path

import pytest

from integration.harness import LocalCluster
from integration.scripts import script

pytest.importorskip("torch", reason="torch is missing: `make test-ecosystem` installs it")

HEAD = """
import os, pickle, sys
import fsspec, torch
from torch.utils.data import DataLoader
from emberfs.client.ecosystem import torch as ours
from emberfs.client.ecosystem.torch import Records
fs = fsspec.filesystem("emberfs")
DATA = bytes(os.urandom(1_000_003))
fs.pipe_file("/data", DATA)
"""


def program(cluster: LocalCluster, text: str) -> str:
    return script(cluster, HEAD + text)


def test_samples_are_the_bytes_of_their_ranges(shared: LocalCluster) -> None:
    program(
        shared,
        """
samples = Records("emberfs:///data", sample_bytes=1000)
assert len(samples) == 1000  # the last 3 bytes are no sample
assert bytes(samples[-1]) == DATA[999_000:1_000_000]
places = torch.randperm(1000)[:300].tolist()
assert [bytes(one) for one in samples.__getitems__(places)] == [
    DATA[n * 1000 : n * 1000 + 1000] for n in places
]
index = [(999_999, 4), (0, 0), (5, 300_000)]
ranges = Records(fs.unstrip_protocol("/data"), index=index, transform=lambda one: len(one))
assert (len(ranges), ranges.__getitems__([2, 1, 0])) == (3, [300_000, 0, 4])
assert ranges.collate([3, 1]).tolist() == [3, 1]
""",
    )


def test_a_batch_is_one_call_into_one_memory(shared: LocalCluster) -> None:
    program(
        shared,
        """
calls = []
read_many = ours.read_many
ours.read_many = lambda wanted: (calls.append(len(wanted)), read_many(wanted))[1]
samples = Records("emberfs:///data", sample_bytes=1000)
batch = samples.__getitems__(list(range(64)))
assert calls == [64], calls
whole = samples.collate(batch)
assert whole.shape == (64, 1000) and whole.data_ptr() == batch[0].data_ptr()
assert bytes(whole.reshape(-1)) == DATA[:64_000]
mixed = samples.collate(batch[::-1])  # not in order in memory: copied
assert mixed.data_ptr() != batch[-1].data_ptr()
assert bytes(mixed[0]) == DATA[63_000:64_000]
address = whole.data_ptr()
held = samples.__getitems__([7] * 64)
assert bytes(whole.reshape(-1)) == DATA[:64_000]  # in use, so not used again
del whole, batch, mixed
assert address in {samples.__getitems__([n] * 64)[0].data_ptr() for n in range(2)}
""",
    )


def test_bad_samples_are_said(shared: LocalCluster) -> None:
    program(
        shared,
        """
def refused(kind, text, work):
    try:
        work()
    except kind as problem:
        assert text in str(problem), problem
    else:
        sys.exit(f"not refused: {text}")

refused(ValueError, "either", lambda: Records("emberfs:///data"))
refused(ValueError, "either", lambda: Records("emberfs:///data", sample_bytes=1, index=[]))
refused(FileNotFoundError, "none", lambda: Records("emberfs:///none", sample_bytes=1))
samples = Records("emberfs:///data", sample_bytes=1000)
refused(IndexError, "sample 1000 of 1000", lambda: samples[1000])
ranges = Records("emberfs:///data", index=[(1_000_000, 10)])
refused(OSError, "ends 7 bytes before", lambda: ranges[0])
""",
    )


WORKERS = """
import sys
import fsspec
from torch.utils.data import DataLoader
from emberfs.client.ecosystem.torch import Records

DATA = bytes(n * n % 251 for n in range(1_000_000))

def whole(sample):
    return int(sample.sum())

if __name__ == "__main__":
    kind, before = sys.argv[1:]
    fsspec.filesystem("emberfs").pipe_file("/squares", DATA)
    samples = Records("emberfs:///squares", sample_bytes=1000, transform=whole)
    if before == "used":
        samples[0]
    loader = DataLoader(
        samples, batch_size=100, shuffle=True, num_workers=2, multiprocessing_context=kind,
        persistent_workers=True,
    )
    for _ in range(2):
        found = sorted(int(n) for batch in loader for n in batch)
        assert found == sorted(sum(DATA[n * 1000 : n * 1000 + 1000]) for n in range(1000))
    del loader
    assert samples[3] == sum(DATA[3000:4000])
"""


@pytest.mark.parametrize("before", ["used", "unused"])
@pytest.mark.parametrize("kind", ["fork", "spawn", "forkserver"])
def test_workers_read_for_themselves(
    shared: LocalCluster, tmp_path: Path, kind: str, before: str
) -> None:
    path = tmp_path / "train.py"  # spawned workers import it
    path.write_text(WORKERS)
    start = (
        "import subprocess, sys; "
        "sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], timeout=50).returncode)"
    )
    script(shared, start, str(path), kind, before)
