"""What a failed sync means for a chunk store, and what only looks like one."""

import pytest

from emberfs.proto.errors import Code, EmberfsError
from unit.chunk_faults import FakeEnv, World


def _written(seed: int) -> World:
    world = World(FakeEnv(seed))
    while not world.store._table.undo and not world.store._table.redo:
        world.update()
    for _ in range(20):
        world.update()
    return world


def test_s11_no_room_for_tidying_up_is_no_failed_sync() -> None:
    """When all is stable, a full disk must not put the target out of service for ever."""
    for seed in range(20):
        world = _written(seed)
        env = world.env
        env.store.write_error = EmberfsError(Code.NO_SPACE, "full")
        world.store.flush()  # every sync of it succeeds
        env.store.write_error = None
        world.store.flush()
        assert not world.store.check().findings


def test_after_a_failed_sync_the_next_to_open_distrusts_the_store() -> None:
    world = _written(3)
    env = world.env
    env.store.sync_error = EmberfsError(Code.DISK, "Input/output error")
    for _ in range(2):
        with pytest.raises(EmberfsError) as raised:  # and it stays one
            world.store.flush()
        assert raised.value.code == Code.DISK
    env.store.sync_error = None
    # The process dies and starts again in the same boot of the machine: dirty pages may be gone.
    assert env.open().power_cut_possible


def test_a_store_that_is_opened_again_in_the_same_boot_is_trusted() -> None:
    world = _written(4)
    assert not world.env.open().power_cut_possible
    assert world.env.open(distrust=True).power_cut_possible


@pytest.mark.parametrize("in_order", [True, False])
def test_r12_a_store_that_may_have_lost_something_is_doubted_until_it_is_complete(
    in_order: bool,
) -> None:
    """A second start in the same boot took it for complete: what was lost was not missed."""
    env = _written(5).env
    env.power_cut()
    for _ in range(2):
        store = env.open()
        assert store.power_cut_possible
        if in_order:
            store.close()
    store = env.open()
    store.trust()
    assert not env.open().power_cut_possible


def test_r12_trust_does_not_hide_a_sync_that_has_failed() -> None:
    world = _written(6)
    env = world.env
    store = env.open(distrust=True)
    env.store.sync_error = EmberfsError(Code.DISK, "Input/output error")
    with pytest.raises(EmberfsError):
        store.flush()
    env.store.sync_error = None
    store.trust()
    assert env.open().power_cut_possible
