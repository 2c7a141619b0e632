"""The checker of contents: close-to-open, own writes, lengths, power cuts."""

from typing import NamedTuple

import pytest

from sim.check_files import check_files
from sim.history import History, Op
from sim.stamps import stamp_fill


class Via(NamedTuple):
    """As files_load.Via."""

    life: int
    opened: int
    direct: bool = False


class Story:
    """A history of one file, told step by step; times pass by themselves."""

    def __init__(self) -> None:
        self.history = History()
        self.via: dict[int, Via] = {}
        self.written: dict[int, bytes] = {}

    def open(self, life: int) -> int:
        """Open; the number of the operation."""
        return self._done(life, -1, "open").number

    def write(self, life: int, opened: int, offset: int, length: int, direct: bool = False) -> Op:
        """Write with a stamp of its own."""
        stamp = self.history.next_stamp()
        data = stamp_fill(stamp, offset, length)
        return self._done(life, opened, "write", offset, length, data, direct)

    def flush(self, life: int, opened: int) -> Op:
        """Flush: fsync or close."""
        return self._done(life, opened, "flush")

    def cut(self, life: int, opened: int, size: int) -> Op:
        """Truncate."""
        return self._done(life, opened, "truncate", size)

    def read(self, life: int, opened: int, saw: bytes, length: int = 100) -> Op:
        """Read from the beginning."""
        op = self.history.begin(life, "read", ("file", 7), 0, length, 0)
        self.via[op.number] = Via(life, opened)
        self.history.end(op, 0, "ok", saw)
        return op

    def _done(
        self,
        life: int,
        opened: int,
        kind: str,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
        direct: bool = False,
    ) -> Op:
        op = self.history.begin(life, kind, ("file", 7), offset, length, 0, data)
        self.via[op.number] = Via(life, op.number if opened < 0 else opened, direct)
        self.history.end(op, 0, "ok")
        return op

    def rules(self, **more: int) -> set[str]:
        """What the checker says."""
        return {violation.rule for violation in check_files(self.history, self.via, **more)}


def test_a_client_sees_its_own_writes_and_its_own_length() -> None:
    story = Story()
    file = story.open(1)
    one = story.write(1, file, 0, 40)
    story.read(1, file, one.payload)
    assert story.rules() == set()
    story.read(1, file, one.payload[:30])
    assert story.rules() == {"file content", "file length"}


def test_close_to_open_between_clients() -> None:
    for flushed, old_is_fine in ((False, True), (True, False)):
        story = Story()
        file = story.open(1)
        story.write(1, file, 0, 40)
        if flushed:
            story.flush(1, file)
        other = story.open(2)
        story.read(2, other, b"")
        assert (story.rules() == set()) == old_is_fine


def test_who_opened_before_the_flush_may_see_the_old() -> None:
    story = Story()
    other = story.open(2)
    file = story.open(1)
    one = story.write(1, file, 0, 40)
    story.flush(1, file)
    story.read(2, other, b"")
    story.read(2, other, one.payload)
    assert story.rules() == set()


def test_direct_writes_are_certain_as_far_as_the_file_is_known_to_reach() -> None:
    story = Story()
    file = story.open(1)
    story.write(1, file, 0, 40, direct=True)
    other = story.open(2)
    story.read(2, other, b"")
    assert story.rules() == set()
    story.read(2, other, bytes(40))
    assert story.rules() == {"file content"}


def test_truncations_are_told_at_once() -> None:
    story = Story()
    file = story.open(1)
    one = story.write(1, file, 0, 40)
    story.flush(1, file)
    story.cut(1, file, 16)
    story.read(2, story.open(2), one.payload[:16])
    assert story.rules() == set()
    story.read(2, story.open(2), one.payload)
    assert story.rules() == {"file content"}


def test_a_power_cut_undoes_what_was_not_flushed_and_no_more() -> None:
    story = Story()
    file = story.open(1)
    one = story.write(1, file, 0, 40)
    story.flush(1, file)
    two = story.write(1, file, 0, 40, direct=True)
    cut_ns = (two.end_ns or 0) + 1
    story.history.begin(9, "stat", ("path", "x"), 0, 0, cut_ns)
    story.read(1, file, one.payload)
    assert story.rules() != set()
    assert story.rules(cut_ns=cut_ns) == set()
    story.read(1, file, b"")
    assert story.rules(cut_ns=cut_ns) == {"file content"}


@pytest.mark.parametrize("told", [True, False])
def test_a_flush_after_a_power_cut_answers_for_what_was_written_before(told: bool) -> None:
    story = Story()
    file = story.open(1)
    one = story.write(1, file, 0, 40)
    story.flush(1, file)
    two = story.write(1, file, 0, 40, direct=True)
    cut_ns = (two.end_ns or 0) + 1
    story.history.begin(9, "stat", ("path", "x"), 0, 0, cut_ns)
    if told:
        failed = story.flush(1, file)
        failed.outcome = "unknown"
    story.flush(1, file)
    story.read(1, file, one.payload)
    assert story.rules(cut_ns=cut_ns) == (set() if told else {"file content"})


def test_bytes_from_nowhere_are_found() -> None:
    story = Story()
    file = story.open(1)
    story.read(2, file, b"?" * 40)
    assert "phantom" in story.rules()
