"""Power cuts, process crashes and full disks at every point of the chunk store's life."""

import pytest

from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import KiB, MiB
from unit.chunk_faults import Crash, FakeEnv, World


def lives_to_the_end(world: World) -> bool:
    """Run, perhaps close; False when the fuse burnt meanwhile."""
    world.env.fuse.crash_at = world.env.fuse.count + world.dice.randint(1, 60)
    try:
        world.run(25)
        world.env.fuse.guest = None
        if world.dice.random() < 0.5:
            world.store.close()
            return True
    except Crash:
        pass
    return False


def crash_life(seed: int, *, power: float, chunk_bytes: int = 256 * KiB) -> None:
    """Live through four crashes; `power` is the share of them that are power cuts."""
    env = FakeEnv(seed)
    world = World(env, chunk_bytes=chunk_bytes)
    for _ in range(4):
        power_cut = env.random.random() < power
        env.fuse.guest = guest_of(world) if seed % 2 else None
        closed = lives_to_the_end(world)
        env.fuse.crash_at, env.fuse.guest = -1, None
        if closed:
            for truth in world.truths.values():
                truth.versions = [truth.now]
        if power_cut:
            env.power_cut()
        if env.random.random() < 0.3:
            crash_while_opening(env, power_cut=power_cut)
        world.recover(power_cut=power_cut)
        if env.random.random() < 0.5:
            world.flush()
    world.run(10)
    world.compare()


def crash_while_opening(env: FakeEnv, *, power_cut: bool) -> None:
    """Recovery itself is interrupted; it begins again from whatever it left."""
    env.fuse.crash_at = env.fuse.count + env.random.randint(1, 8)
    try:
        env.open().close()
    except Crash:
        env.fuse.crash_at = -1
        if power_cut:
            env.power_cut()


def guest_of(world: World) -> "object":
    """Updates that come while a flush waits for the disk."""

    def act() -> None:
        guest, world.env.fuse.guest = world.env.fuse.guest, None
        try:
            for _ in range(world.dice.randint(0, 2)):
                world.update()
        finally:
            world.env.fuse.guest = guest

    return act


def crash_lives(seeds: range, **options: float) -> None:
    for seed in seeds:
        try:
            crash_life(seed, **options)  # type: ignore[arg-type]
        except BaseException:
            print(f"failing: crash_life({seed}, **{options})")
            raise


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_s1_r12_o6_power_cut_keeps_everything_flushed(first: int) -> None:
    """A power cut between any two disk operations keeps everything that was flushed."""
    crash_lives(range(first, first + 50), power=1)


@pytest.mark.parametrize("first", range(0, 100, 50))
def test_s1_o6_process_crash_loses_nothing(first: int) -> None:
    """Death between any two disk operations loses nothing; no block is owned twice or leaked."""
    crash_lives(range(first, first + 50), power=0)


@pytest.mark.parametrize("first", range(0, 100, 50))
def test_s1_r12_o6_power_cuts_and_process_crashes_in_turns(first: int) -> None:
    """Crashes of both kinds in turns, also during recovery itself."""
    crash_lives(range(first, first + 50), power=0.5)


def test_crashes_with_coarse_checksums() -> None:
    crash_lives(range(1000, 1006), power=0.5, chunk_bytes=6 * MiB)


def fails_for_space(world: World) -> bool:
    try:
        world.update()
    except EmberfsError as problem:
        if problem.code != Code.NO_SPACE:
            raise
        world.in_flight = None
        return True
    return False


def test_s11_full_disk_at_every_write_point() -> None:
    """S11: whatever write meets ENOSPC, committed content stays and the caller hears NO_SPACE."""
    heard = 0
    for seed in range(100):
        env = FakeEnv(seed)
        world = World(env)
        world.run(15)
        for _ in range(6):
            env.fuse.error_at = env.fuse.count + env.random.randint(1, 3)
            if fails_for_space(world):
                heard += 1
            env.fuse.error_at = -1
            world.compare()
        world.flush()
        world.compare()
    assert heard > 100


def test_random_life_without_faults() -> None:
    for seed in range(60):
        env = FakeEnv(seed)
        world = World(env)
        env.fuse.guest = guest_of(world) if seed % 3 == 0 else None
        for _ in range(4):
            world.run(15)
            world.compare()
        env.fuse.guest = None
        world.store.close()
        world.store = env.open()
        assert not world.store.power_cut_possible
        world.compare()
        used = world.store.used_bytes
        world.flush()
        world.flush()
        assert world.store.used_bytes <= used
