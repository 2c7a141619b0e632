"""What the kernel may believe: for long, while changes are announced, and never beyond them."""

from collections.abc import Collection

import pytest

from emberfs.client import kernelcache
from emberfs.client.kernelcache import KernelCache, Timeouts
from emberfs.proto.ids import InodeId
from emberfs.proto.meta_calls import Change

SHORT, LONG = 1.0, 60.0
DIRECTORY, FILE = 10, 11


class FakeKernel:
    """Notes what is dropped."""

    def __init__(self) -> None:
        self.names: list[tuple[int, bytes]] = []
        self.attributes: list[int] = []
        self.inodes = {DIRECTORY, FILE}
        self.absent: set[int] = set()  # answered, and not taken in yet

    def drop_attributes(self, inode: int) -> bool:
        self.attributes.append(inode)
        return inode not in self.absent

    def drop_all_attributes(self, inodes: Collection[int]) -> None:
        self.attributes += sorted(inodes)

    def drop_name(self, directory: int, name: bytes) -> None:
        self.names.append((directory, name))

    def held(self) -> Collection[int]:
        return self.inodes


class World:
    """A cache that hears every change, until it is told not to."""

    def __init__(self) -> None:
        self.kernel = FakeKernel()
        self.current = True
        self.cache = KernelCache(self.kernel, Timeouts(SHORT, LONG), Timeouts(SHORT, LONG))
        self.cache.is_current = lambda: self.current

    def name_s(self, name: bytes, mark: int | None = None, *, listed: bool = False) -> float:
        at = self.cache.mark() if mark is None else mark
        return self.cache.name_timeout_s(DIRECTORY, name, at, listed=listed)

    def attributes_s(self, mark: int | None = None) -> float:
        return self.cache.attribute_timeout_s(FILE, self.cache.mark() if mark is None else mark)

    def change(self, inode: int, name: bytes = b"") -> None:
        self.cache.heard([Change(InodeId(inode), name)])


def test_believed_for_long_while_changes_are_heard() -> None:
    world = World()
    assert (world.name_s(b"a"), world.attributes_s()) == (LONG, LONG)
    world.current = False
    assert (world.name_s(b"a"), world.attributes_s()) == (SHORT, SHORT)


def test_what_has_changed_is_dropped_once() -> None:
    world = World()
    world.name_s(b"a")
    for _ in range(2):
        world.change(DIRECTORY, b"a")
    world.change(DIRECTORY, b"never told")
    world.change(FILE)
    world.change(99)  # not in the kernel
    assert world.kernel.names == [(DIRECTORY, b"a")]
    assert world.kernel.attributes == [FILE]


def test_an_answer_that_was_under_way_during_a_change_is_believed_for_short() -> None:
    world = World()
    mark = world.cache.mark()
    world.change(DIRECTORY, b"a")
    world.change(FILE)
    assert (world.name_s(b"a", mark), world.attributes_s(mark)) == (SHORT, SHORT)
    assert world.name_s(b"b", mark) == LONG
    assert (world.name_s(b"a"), world.attributes_s()) == (LONG, LONG)


def test_an_answer_is_compared_with_very_many_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelcache, "RECENT_MAX", 3)
    world = World()
    mark = world.cache.mark()
    for inode in range(20, 25):
        world.change(inode)
    assert world.attributes_s(mark) == SHORT
    assert world.attributes_s() == LONG


def test_attributes_that_the_kernel_takes_in_late_are_dropped_then() -> None:
    world = World()
    world.kernel.absent = {FILE}
    world.change(FILE)
    world.cache.look_again()
    assert world.kernel.attributes == [FILE, FILE]
    world.kernel.absent.clear()
    world.cache.look_again()
    world.cache.look_again()
    assert world.kernel.attributes == [FILE] * 3


def test_an_inode_that_is_forgotten_meanwhile_is_not_waited_for() -> None:
    world = World()
    world.kernel.absent = {FILE}
    world.change(FILE)
    world.kernel.inodes.discard(FILE)
    world.cache.look_again()
    assert world.kernel.attributes == [FILE]


def test_everything_is_dropped_when_a_change_may_have_been_missed() -> None:
    world = World()
    world.name_s(b"a")
    world.name_s(b"b", listed=True)
    world.attributes_s()
    mark = world.cache.mark()
    world.cache.lost()
    assert sorted(world.kernel.names) == [(DIRECTORY, b"a"), (DIRECTORY, b"b")]
    assert world.kernel.attributes == [DIRECTORY, FILE]
    assert (world.name_s(b"a", mark), world.attributes_s(mark)) == (SHORT, SHORT)
    assert world.name_s(b"a") == LONG


def test_nothing_is_dropped_that_was_told_for_short() -> None:
    world = World()
    world.current = False
    world.name_s(b"a")
    world.cache.lost()
    assert (world.kernel.names, world.kernel.attributes) == ([], [])


def test_the_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelcache, "NAMES_MAX", 8)
    monkeypatch.setattr(kernelcache, "EVICTED", 2)
    world = World()
    for n in range(8):
        assert world.name_s(b"%d" % n) == LONG
    assert world.name_s(b"listed", listed=True) == SHORT
    assert world.name_s(b"3") == LONG
    assert world.kernel.names == []
    assert world.name_s(b"asked for") == LONG
    assert world.kernel.names == [(DIRECTORY, b"0"), (DIRECTORY, b"1")]


def test_short_times_stay_where_long_ones_are_switched_off() -> None:
    world = World()
    cache = KernelCache(world.kernel, Timeouts(SHORT, 0), Timeouts(SHORT, 0))
    cache.is_current = lambda: True
    assert cache.name_timeout_s(DIRECTORY, b"a", cache.mark()) == SHORT
    assert cache.attribute_timeout_s(FILE, cache.mark()) == SHORT
