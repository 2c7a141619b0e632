"""Quotas and removed trees under load, with a metadata server that dies: fsck agrees in the end."""

import asyncio
import random

import pytest

from sim.cluster import Shape
from sim.scenario_files import Stage, stage_files
from sim.trees_lane import TOP, TreesLane
from sim.violation import report

SECONDS = 25.0
SHAPE = Shape(meta=1, chains=1, scrub=False)


async def rage(stage: Stage, dice: random.Random, *, power: bool) -> None:
    """All clients work; the metadata server dies now and then."""
    stage.load.stopping = False
    await stage.at(0, lambda fs: fs.mkdir(TOP))
    await stage.at(0, lambda fs: fs.set_quota(TOP, files_max=12, bytes_max=40_000))
    lanes = [
        stage.begin(index, lambda fs: TreesLane(stage.load, fs, random.Random(dice.random())).run())
        for index in range(len(stage.world.clients))
    ]
    end_s = stage.world.loop.time() + SECONDS
    while stage.world.loop.time() < end_s:
        await asyncio.sleep(dice.uniform(1, 5))
        if power and dice.random() < 0.5:
            stage.cut_meta()
            await asyncio.sleep(dice.uniform(0.1, 1))
            stage.power_on()
        else:
            stage.meta.kill()
            await asyncio.sleep(dice.uniform(0.1, 1))
            stage.revive(stage.meta)
    stage.load.stopping = True
    await asyncio.gather(*lanes)


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("seed", range(1, 6))
def test_quotas_and_trees_survive(seed: int, power: bool) -> None:
    dice = random.Random(seed)
    found = stage_files(
        lambda stage: rage(stage, dice, power=power), seed=seed, shape=SHAPE
    ).violations
    assert not found, report(found)
