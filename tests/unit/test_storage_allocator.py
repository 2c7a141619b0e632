"""The allocation bitmaps against a plain set of positions, and the overlay against plain bytes."""

import random

import pytest

from emberfs.proto.ids import KiB, MiB
from emberfs.runtime.checksum import crc32c_blocks_twin
from emberfs.storage.allocator import (
    CLASS_BYTES,
    GROUP_BLOCKS,
    GROUP_BYTES,
    NO_BLOCK,
    Allocator,
    block_bytes,
    class_for,
    is_position,
    pack_position,
    place_of,
    unpack_position,
)
from emberfs.storage.content import stream_checksums
from emberfs.storage.records import NO_TRIM, UNIT_BYTES, RedoRecord
from emberfs.storage.redo import RedoLog, patch, runs_of


def test_smallest_class_that_holds_the_length() -> None:
    for length in (0, 1, 64 * KiB, 64 * KiB + 1, MiB - 1, MiB, MiB + 1, 64 * MiB):
        size_class = class_for(length)
        assert CLASS_BYTES[size_class] >= length
        assert size_class == 0 or CLASS_BYTES[size_class - 1] < length


def test_blocks_tile_their_files() -> None:
    for size_class, count in enumerate(GROUP_BLOCKS):
        assert 16 * MiB <= GROUP_BYTES[size_class] <= 64 * MiB
        places = [
            place_of(pack_position(size_class, group, index))[1]
            for group in range(2)
            for index in range(count)
        ]
        assert places == [CLASS_BYTES[size_class] * n for n in range(2 * count)]


def test_positions_pack_and_unpack() -> None:
    position = pack_position(10, (1 << 40) - 1, 0)
    assert unpack_position(position) == (10, (1 << 40) - 1, 0)
    assert is_position(position)
    assert block_bytes(position) == 64 * MiB
    assert not is_position(NO_BLOCK)
    assert not is_position(position | 1)  # groups of the largest class have one block


def test_s1_random_life_against_a_set() -> None:
    """In a long random life no block has two owners and none leaks."""
    dice = random.Random(5)
    allocator, owned, taken = Allocator(), set[int](), set[int]()
    for _ in range(4000):
        roll = dice.random()
        if roll < 0.5:
            size_class = dice.choice([0, 0, 0, 4, 10])
            position = allocator.take(size_class)
            if position is None:
                allocator.add_group(size_class, allocator.next_group(size_class))
                position = allocator.take(size_class)
            assert position is not None
            assert position not in owned | taken
            taken.add(position)
        elif roll < 0.7 and taken:
            position = dice.choice(sorted(taken))
            taken.remove(position)
            allocator.record(allocator.preview([position], []))
            owned.add(position)
        elif roll < 0.85 and taken:
            position = dice.choice(sorted(taken))
            taken.remove(position)
            allocator.give(position)
        elif owned:
            position = dice.choice(sorted(owned))
            owned.remove(position)
            allocator.record(allocator.preview([], [position]))
            allocator.give(position)
        for size_class in (0, 4, 10):
            for group in allocator.idle_groups(size_class):
                allocator.drop_group(size_class, group)
    allocator.check()
    assert allocator.used_bytes == sum(map(block_bytes, owned | taken))


def test_s1_preview_changes_nothing_and_refuses_two_owners() -> None:
    """Blocks with two owners are refused when the allocator is built."""
    allocator = Allocator()
    allocator.add_group(0, 0)
    position = allocator.take(0)
    assert position is not None
    first = allocator.preview([position], [])
    assert first == allocator.preview([position], [])
    allocator.record(first)
    with pytest.raises(AssertionError):
        allocator.preview([position], [])
    with pytest.raises(AssertionError):
        allocator.give(position)


def test_lowest_block_is_taken_first() -> None:
    allocator = Allocator()
    for group in range(3):
        allocator.add_group(8, group)
    blocks = [allocator.take(8) for _ in range(3)]
    assert blocks == [pack_position(8, group, 0) for group in range(3)]
    allocator.give(pack_position(8, 1, 0))
    allocator.give(pack_position(8, 0, 0))
    assert allocator.take(8) == pack_position(8, 0, 0)


def test_overlay_is_the_fold_of_its_rows() -> None:
    for seed in range(200):
        dice = random.Random(seed)
        content = bytearray(dice.randbytes(dice.randint(1, 60000)))
        disk = bytearray(content)
        log = RedoLog(b"chunk", 0)  # type: ignore[arg-type]
        for version in range(1, 12):
            if dice.random() < 0.3:
                length = dice.randint(0, len(content))
                del content[length:]
                log.add(version, RedoRecord(length, 0, b""))
                continue
            first = dice.randint(0, len(content) // UNIT_BYTES)
            start = first * UNIT_BYTES
            count = dice.randint(1, 3 * UNIT_BYTES)
            stop = -(-(start + count) // UNIT_BYTES) * UNIT_BYTES
            if stop > len(content):
                content.extend(bytes(min(stop, 65536) - len(content)))
            content[start:stop] = dice.randbytes(len(content[start:stop]))
            log.add(version, RedoRecord(NO_TRIM, first, bytes(content[start:stop])))
        disk = (disk + bytes(65536))[: len(content)]
        # Rows extend the content; where none covers it the block's own bytes count.
        seen = bytearray(disk)
        patch(memoryview(seen), 0, log.overlay)
        for offset, pieces in runs_of(log.overlay):
            joined = b"".join(pieces)
            assert content[offset : offset + len(joined)] == joined
            assert seen[offset : offset + len(joined)] == joined
            assert offset + len(joined) <= len(content)
        assert log.overlay_bytes == sum(map(len, log.overlay.values()))
        log.settle(dict(log.overlay), 11)
        assert log.overlay_bytes == 0
        assert not log.overlay


@pytest.mark.parametrize("grain", [4 * KiB, 64 * KiB])
def test_checksums_of_a_stream_with_a_gap(grain: int) -> None:
    dice = random.Random(grain)
    for _ in range(60):
        prefix = dice.randbytes(dice.choice([0, 1, dice.randrange(grain)]))
        gap = dice.choice([0, 1, dice.randrange(3 * grain), 2 * grain])
        data = dice.randbytes(dice.choice([0, 1, dice.randrange(3 * grain)]))
        whole = prefix + bytes(gap) + data
        found = stream_checksums(memoryview(prefix), gap, memoryview(data), grain)
        assert found == crc32c_blocks_twin(whole, grain)
