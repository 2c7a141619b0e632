"""Stamps tell their writer at any alignment; histories survive files and kills."""

from pathlib import Path
from random import Random

from sim.history import History, load
from sim.stamps import bytes_of, carries, cell_of, covering, number_of, runs_of, stamp_fill


def test_a_cell_gives_its_number_back() -> None:
    random = Random(1)
    numbers = [1, 2, 255, 256, (1 << 56) - 1] + [random.randrange(1, 1 << 56) for _ in range(500)]
    for number in numbers:
        assert number_of(cell_of(number)) == number
        assert min(cell_of(number)) >= 0x80
    assert number_of(bytes(8)) == 0
    assert number_of(b"emberfs!") is None


def test_any_range_is_in_step_with_the_file() -> None:
    whole = stamp_fill(77, 0, 200)
    for offset in range(20):
        for length in range(60):
            assert stamp_fill(77, offset, length) == whole[offset : offset + length]


def test_runs_describe_any_payload_exactly() -> None:
    random = Random(2)
    for _ in range(300):
        offset, at, data = random.randrange(30), 0, b""
        for _ in range(random.randrange(1, 6)):
            number, length = random.choice((0, random.randrange(1, 99))), random.randrange(1, 300)
            data += stamp_fill(number, offset + at, length) if number else bytes(length)
            at += length
        runs = runs_of(data, offset)
        assert bytes_of(runs) == data
        start = offset + random.randrange(len(data))
        part = list(covering(runs, start, offset + len(data)))
        assert bytes_of(part) == data[start - offset :]
    assert all(carries(run, 5) for run in covering(runs_of(stamp_fill(5, 0, 99), 0), 13, 17))
    assert len(runs_of(stamp_fill(3, 4096, 1 << 20), 4096)) == 1
    assert len(runs_of(random.randbytes(1 << 16), 0)) < 300, "foreign bytes are not kept"


def _record(history: History) -> None:
    write = history.begin(1, "write", ("f", 7, b"\xff"), 8, 64, 100, stamp_fill(1, 8, 64))
    read = history.begin(2, "read", ("f", 7, b"\xff"), 0, 72, 100)
    for sent_ns in (98, 97, 99):
        write.heard(sent_ns)
    history.end(write, 100, "ok")
    write.heard(5)
    history.end(read, 50, "ok", bytes(8) + stamp_fill(1, 8, 64))
    history.begin(1, "flush", ("f",), 0, 0, 200)


def test_events_are_ordered_where_the_clock_stands_still() -> None:
    history = History()
    _record(history)
    times = [history.ops[0].start_ns, history.ops[1].start_ns]
    times += [history.ops[0].end_ns or 0, history.ops[1].end_ns or 0]
    assert times == [100, 101, 102, 103]
    assert history.next_stamp() == 2
    assert history.ops[0].answered_ns == 97, "the first, however late it came; none after the end"


def test_files_keep_everything(tmp_path: Path) -> None:
    history = History()
    _record(history)
    history.dump(tmp_path / "h")
    again = load([tmp_path / "h"])
    assert again.digest() == history.digest()
    assert again.tail(2) == history.tail(2)
    assert [op.answered_ns for op in again] == [97, None, None]
    again.ops[1].end_ns = 104
    assert again.digest() != history.digest()


def test_a_killed_process_leaves_its_history(tmp_path: Path) -> None:
    path = tmp_path / "h"
    with path.open("w") as file:
        history = History(sink=file.write)
        _record(history)
    text = path.read_text()
    assert load([path]).digest() == history.digest()
    path.write_text(text[: text.rindex("\n", 0, -1) + 40])  # torn in the last line
    assert [op.kind for op in load([path])] == ["write", "read"]


def test_a_write_that_is_no_stamp_is_refused() -> None:
    try:
        History().begin(1, "write", ("f",), 0, 16, 0, b"0123456789abcdef")
    except ValueError:
        return
    raise AssertionError("accepted")
