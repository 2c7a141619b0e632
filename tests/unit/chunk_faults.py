"""A world for the chunk store: a disk that loses, a store that loses, a model that remembers.

Fault model of FakeDisk: a power cut keeps any subset of the 512-byte sectors of each unsynced
write, in any combination; file sizes fall back to what was synced. The row store keeps a
prefix of its unsynced batches. A process crash loses nothing. Both may come between any two
operations on disk or store, or in the middle of one.
"""

import errno
import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from emberfs.kv.memory import MemoryStore
from emberfs.kv.store import Change, Range
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, ChunkId, InodeId, KiB, pack_chunk_id
from emberfs.proto.storage_calls import RememberedWrite, UpdateKind
from emberfs.storage.chunks import ChunkStore

SECTOR = 512


class Crash(BaseException):
    """The machine or the process ends here; no handler may go on."""


class Fuse:
    """Counts operations; burns (raises) at a chosen one, or lets a guest act at some of them."""

    def __init__(self) -> None:
        self.count = 0
        self.crash_at = -1
        self.error_at = -1
        self.error: Callable[[], Exception] = lambda: OSError(errno.ENOSPC, "No space left")
        self.guest: Callable[[], None] | None = None

    def step(self, *, syncs: bool = False, fails: bool = True) -> None:
        self.count += 1
        if self.count == self.crash_at:
            raise Crash
        if fails and self.count == self.error_at:
            raise self.error()
        if syncs and self.guest is not None:
            self.guest()


class FakeFile:
    def __init__(self, fuse: Fuse, dice: random.Random) -> None:
        self.fuse, self.dice = fuse, dice
        self.data = bytearray()
        self.durable = bytearray()
        self.length = self.durable_length = 0
        self.unsynced: list[tuple[int, bytes]] = []

    def read_into(self, view: memoryview, offset: int) -> int:
        found = self.data[offset : offset + len(view)]
        view[: len(found)] = found
        end = max(0, min(len(view), self.length - offset))
        if end > len(found):
            view[len(found) : end] = bytes(end - len(found))
        return max(end, len(found))

    read_cached_into = read_into

    def fileno(self) -> int:
        return -1

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        content = b"".join(views)
        try:
            self.fuse.step()
        except Crash:
            self._put(content[: self.dice.randrange(len(content) + 1)], offset)
            raise
        self._put(content, offset)

    def _put(self, content: bytes, offset: int) -> None:
        _overwrite(self.data, content, offset)
        self.length = max(self.length, len(self.data))
        self.unsynced.append((offset, content))

    def allocate(self, offset: int, length: int) -> None:
        self.fuse.step()
        self.length = max(self.length, offset + length)

    def punch(self, offset: int, length: int) -> None:
        self.fuse.step(fails=False)
        end = min(len(self.data), offset + length)
        if end > offset:
            self._put(bytes(end - offset), offset)
        if offset + length >= self.length:
            self.length = offset
            del self.data[offset:]

    def size(self) -> int:
        return self.length

    def datasync(self) -> None:
        self.fuse.step(syncs=True, fails=False)
        for offset, content in self.unsynced:
            _overwrite(self.durable, content, offset)
        self.durable_length = self.length
        self.unsynced = []

    def power_cut(self) -> None:
        for offset, content in self.unsynced:
            fate = self.dice.random()
            for at in range(0, len(content), SECTOR) if fate < 0.5 else (0,):
                whole = fate >= 0.75
                if whole or (fate < 0.5 and self.dice.random() < 0.5):
                    piece = content if whole else content[at : at + SECTOR]
                    _overwrite(self.durable, piece, offset + at)
        self.unsynced = []
        self.length = max(self.durable_length, len(self.durable))
        self.data = bytearray(self.durable)

    def close(self) -> None:
        pass


def _overwrite(target: bytearray, content: bytes, offset: int) -> None:
    if len(target) < offset:
        target.extend(bytes(offset - len(target)))
    target[offset : offset + len(content)] = content


class _Space(NamedTuple):
    total_bytes: int
    free_bytes: int


class FakeDisk:
    def __init__(self, fuse: Fuse, dice: random.Random) -> None:
        self.fuse, self.dice = fuse, dice
        self.files: dict[str, FakeFile] = {}
        self.small: dict[str, bytes] = {}

    def open(self, path: str, *, create: bool = False) -> FakeFile:
        if path not in self.files:
            assert create
            self.files[path] = FakeFile(self.fuse, self.dice)
        return self.files[path]

    def make_directory(self, path: str) -> None:
        pass

    def names(self, path: str) -> list[str]:
        return sorted(self.files)

    def exists(self, path: str) -> bool:
        return path in self.files or path in self.small

    def read_small(self, path: str) -> bytes:
        if path not in self.small:
            raise FileNotFoundError(path)
        return self.small[path]

    def replace_small(self, path: str, content: bytes) -> None:
        self.fuse.step(fails=False)
        self.small[path] = content

    def remove(self, path: str) -> None:
        self.files.pop(path, None)

    def space(self, path: str) -> _Space:
        return _Space(1 << 40, 1 << 40)

    def lock(self, path: str) -> Callable[[], None]:
        return lambda: None


class FusedStore(MemoryStore):
    """A MemoryStore behind the fuse."""

    def __init__(self, fuse: Fuse, dice: random.Random) -> None:
        super().__init__()
        self.fuse, self.dice = fuse, dice

    def write(self, changes: Iterable[Change], clears: Sequence[Range] = ()) -> None:
        changes = list(changes)
        try:
            self.fuse.step()
        except Crash:
            if self.dice.random() < 0.5:
                super().write(changes, clears)
            raise
        except OSError as problem:
            raise EmberfsError(Code.NO_SPACE, str(problem)) from None
        super().write(changes, clears)

    def sync(self) -> None:
        self.fuse.step(syncs=True, fails=False)
        super().sync()


class FakeEnv:
    """As much of an Env as the chunk store uses."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.fuse = Fuse()
        self.disk = FakeDisk(self.fuse, self.random)
        self.boot_id = "boot 1"
        self.host_key = "host"
        self.store = FusedStore(self.fuse, self.random)

    def now_ns(self) -> int:
        return self.fuse.count * MS

    def open(self, **options: int) -> ChunkStore:
        return ChunkStore.open(self, "t", open_store=lambda path: self.store, **options)  # type: ignore[arg-type]

    def power_cut(self) -> None:
        for file in self.disk.files.values():
            file.power_cut()
        self.store.crash(self.random.randint(0, self.store.unsynced_count))
        self.boot_id = f"boot {self.random.getrandbits(60)}"


class Version(NamedTuple):
    """A version of a chunk; content None: absent."""

    number: int
    content: bytes | None


ABSENT = Version(0, None)


class Truth:
    """What one chunk may be: every version since the last flush, the newest last."""

    def __init__(self) -> None:
        self.versions = [ABSENT]
        self.pending: Version | None = None
        self.attempts: list[Version] = []  # prepared since the last recovery

    @property
    def now(self) -> Version:
        return self.versions[-1]


class World:
    """Performs random operations on a store and on the truth."""

    def __init__(self, env: FakeEnv, chunks: int = 4, chunk_bytes: int = 256 * KiB) -> None:
        self.env = env
        self.dice = env.random
        self.chunk_bytes = chunk_bytes
        self.truths = {pack_chunk_id(InodeId(7), n): Truth() for n in range(chunks)}
        self.store = env.open()
        self.in_flight: tuple[ChunkId, Version] | None = None
        self.swaps = False  # what is in flight leaves a pending version in any case

    # ------------------------------------------------------------ operations

    def update(self) -> None:
        chunk = self.dice.choice(list(self.truths))
        truth = self.truths[chunk]
        if truth.pending is not None and self.dice.random() < 0.8:
            self.decide(chunk, truth)
            return
        kind, offset, length, after = self._draw(truth.now)
        data = after.content[offset : offset + length] if after.content is not None else b""
        mark = RememberedWrite(1, 2, self.dice.getrandbits(30), after.number)
        sends = kind in (UpdateKind.WRITE, UpdateKind.REPLACE) and after.content is not None
        call = self.store.prepare_and_commit if self.dice.random() < 0.5 else self.store.prepare
        commits = call == self.store.prepare_and_commit
        self.in_flight = (chunk, after)
        self.swaps = truth.pending is not None and not commits
        truth.attempts.append(after)
        call(
            chunk, kind, version=after.number or truth.now.number + 1, offset=offset,
            length=length, data=memoryview(data) if sends else None,
            chunk_bytes=self.chunk_bytes, remembered=(mark,),
            replace_exists=after.content is not None or kind != UpdateKind.REPLACE,
        )  # fmt: skip
        self.in_flight, self.swaps = None, False
        truth.pending = None if commits else after
        if commits:
            truth.versions.append(after)

    def _draw(self, now: Version) -> tuple[UpdateKind, int, int, Version]:
        dice, old = self.dice, now.content or b""
        number = now.number + 1
        roll = dice.random()
        if roll < 0.08:
            return UpdateKind.REMOVE, 0, 0, ABSENT
        if roll < 0.12 and now.number:
            return UpdateKind.REPLACE, 0, 0, ABSENT
        if roll < 0.2:
            content = dice.randbytes(self._size())
            number = dice.choice([n for n in range(1, 9) if n != now.number])
            return UpdateKind.REPLACE, 0, len(content), Version(number, content)
        if roll < 0.4:
            length = dice.choice([self._size(), max(0, len(old) - dice.randint(0, 6000))])
            content = old[:length] + bytes(max(0, length - len(old)))
            return UpdateKind.TRUNCATE, 0, length, Version(number, content)
        size = self._size()
        places = [len(old), 0, dice.randint(0, self.chunk_bytes), dice.randint(0, len(old))]
        offset = dice.choice(places)
        if dice.random() < 0.5:
            offset -= offset % 4096
        offset = min(offset, self.chunk_bytes - size)
        data = dice.randbytes(size)
        content = old[:offset] + bytes(max(0, offset - len(old))) + data + old[offset + size :]
        return UpdateKind.WRITE, offset, size, Version(number, content)

    def _size(self) -> int:
        limit = self.dice.choice([10, 5000, 5000, 5000, 40000, self.chunk_bytes])
        size = self.dice.randint(1, limit)
        return size if self.dice.random() < 0.6 else min(-(-size // 4096) * 4096, limit)

    def decide(self, chunk: ChunkId, truth: Truth) -> None:
        assert truth.pending is not None
        if self.dice.random() < 0.75:
            state = self.store.state(chunk)
            assert state is not None
            assert state.pending is not None
            self.in_flight = (chunk, truth.pending)
            self.store.commit(chunk, state.pending.version)
            truth.versions.append(truth.pending)
        else:
            self.in_flight = (chunk, truth.now)
            self.store.discard(chunk)
        self.in_flight = None
        truth.pending = None

    def flush(self) -> None:
        before = {chunk: len(truth.versions) - 1 for chunk, truth in self.truths.items()}
        self.store.flush()
        for chunk, place in before.items():
            del self.truths[chunk].versions[:place]

    def run(self, steps: int, flushes: float = 0.1) -> None:
        for _ in range(steps):
            if self.dice.random() < flushes:
                self.flush()
            else:
                self.update()

    # ------------------------------------------------------------ comparing

    def look(self, chunk: ChunkId, version: int = 0) -> Version:
        """Read a version whole, and a random part of it, which must agree."""
        sink = memoryview(bytearray(self.chunk_bytes))
        found = self.store.read_into(chunk, version=version, offset=0, length=len(sink), sink=sink)
        if not found.version:
            assert not found.length
            return ABSENT
        whole = bytes(sink[: found.length])
        offset = self.dice.randint(0, self.chunk_bytes)
        part = memoryview(bytearray(self.dice.randint(0, 20000)))
        again = self.store.try_read_into(
            chunk, version=version, offset=offset, length=len(part), sink=part
        )
        assert again is not None
        assert bytes(part[: again.length]) == whole[offset : offset + len(part)]
        return Version(found.version, whole)

    def compare(self) -> None:
        """The store is exactly the truth."""
        for chunk, truth in self.truths.items():
            assert self.look(chunk) == truth.now
            if truth.pending is not None:
                state = self.store.state(chunk)
                assert state is not None
                assert state.pending is not None
                pending = self.look(chunk, state.pending.version)
                assert pending.content == truth.pending.content
        waiting = sorted(c for c, t in self.truths.items() if t.pending is not None)
        assert self.store.pending_chunks() == waiting
        self.sound()

    def sound(self) -> None:
        answer = self.store.check()
        assert answer.findings == ()
        assert not self.store.damaged

    def recover(self, *, power_cut: bool) -> None:
        """Reopen after a crash; the store may be any version that the fault model allows."""
        self.env.fuse.crash_at = -1
        self.env.fuse.guest = None
        self.store = self.env.open()
        assert power_cut or not self.store.power_cut_possible
        self.store.trust()
        for chunk, truth in self.truths.items():
            allowed = list(truth.versions) if power_cut else [truth.now]
            if self.in_flight is not None and self.in_flight[0] == chunk:
                allowed.append(self.in_flight[1])
            found = self.look(chunk)
            assert found in allowed, f"{found.number} of {[v.number for v in allowed]}"
            state = self.store.state(chunk)
            pending = state.pending if state is not None else None
            if pending is not None:
                prepared = self.look(chunk, pending.version).content
                assert prepared in [v.content for v in truth.attempts]
            elif truth.pending is not None and not power_cut:
                assert self.in_flight is not None
                assert self.in_flight[0] == chunk
                assert not self.swaps
            if power_cut:
                truth.versions, truth.attempts = [found], []
            elif found != truth.now:
                truth.versions.append(found)
            truth.pending = Version(pending.version, prepared) if pending is not None else None
            if truth.pending is not None and prepared is None:
                truth.pending = ABSENT
            truth.attempts += [truth.pending] if truth.pending is not None else []
        self.in_flight, self.swaps = None, False
        self.sound()
