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


def crash_life(seed: int, *, power_cut: bool, chunk_bytes: int = 256 * KiB) -> None:
    env = FakeEnv(seed)
    world = World(env, chunk_bytes=chunk_bytes)
    for _ in range(4):
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


@pytest.mark.parametrize("block", range(4))
def test_power_cut_keeps_everything_flushed(block: int) -> None:
    for seed in range(block * 60, block * 60 + 60):
        try:
            crash_life(seed, power_cut=True)
        except BaseException:
            print(f"seed {seed}")
            raise


@pytest.mark.parametrize("block", range(2))
def test_process_crash_loses_nothing(block: int) -> None:
    for seed in range(block * 60, block * 60 + 60):
        try:
            crash_life(seed, power_cut=False)
        except BaseException:
            print(f"seed {seed}")
            raise


@pytest.mark.parametrize("power_cut", [False, True])
def test_crashes_with_coarse_checksums(power_cut: bool) -> None:
    for seed in range(1000, 1004):
        crash_life(seed, power_cut=power_cut, chunk_bytes=6 * MiB)


def test_full_disk_at_every_write_point() -> None:
    """S11: whatever write meets ENOSPC, committed content stays and the caller hears NO_SPACE."""
    heard = 0
    for seed in range(100):
        env = FakeEnv(seed)
        world = World(env)
        world.run(15)
        for _ in range(6):
            env.fuse.error_at = env.fuse.count + env.random.randint(1, 3)
            try:
                world.update()
            except EmberfsError as problem:
                assert problem.code == Code.NO_SPACE
                heard += 1
                world.in_flight = None
                # A prepare or commit that failed has changed nothing at all.
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
