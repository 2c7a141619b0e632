"""A directory that was never complete is known as such, over any number of restarts."""

from pathlib import Path

from emberfs.runtime.real import RealEnv
from emberfs.storage.chunks import ChunkStore
from emberfs.storage.hosted import FILLED, note_blank


def test_r6_r7_a_blank_disk_stays_blank_over_restarts_until_it_was_filled(tmp_path: Path) -> None:
    """An empty replacement of the last complete replica never serves, not even at its next start.

    Found by simulation: a second restart took the empty directory for the old one, and the chain
    came back without its data.
    """
    env, path = RealEnv(), str(tmp_path / "target")
    for _ in range(3):
        assert note_blank(env, path)
        ChunkStore.open(env, path).close()
    Path(path, FILLED).write_bytes(b"yes")
    assert not note_blank(env, path)


def test_a_directory_from_before_the_mark_counts_as_filled(tmp_path: Path) -> None:
    env, path = RealEnv(), str(tmp_path / "target")
    ChunkStore.open(env, path).close()
    assert not note_blank(env, path)
