"""Every scenario over every transport on uvloop, the basics on plain asyncio too."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from emberfs.fabric import peer, shared
from emberfs.fabric.region import Region
from unit.fabric_conformance import BASICS, FILL, SCENARIOS, TRANSPORTS, Bench, bench

Scenario = Callable[[Bench], Awaitable[None]]
Run = Callable[[Coroutine[Any, Any, None]], None]


async def bounded(scenario: Scenario, transport: str) -> None:
    async with asyncio.timeout(20), bench(transport) as made:
        await scenario(made)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_on_uvloop(scenario: Scenario, transport: str) -> None:
    uvloop.run(bounded(scenario, transport))


def test_regions_above_the_bound_of_a_connection_are_streamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Server and caller know the same bound: what does not fit arrives all the same."""
    monkeypatch.setattr(peer, "SHARED_BYTES_MAX", 3 * 4096)
    monkeypatch.setattr(shared, "SHARED_BYTES_MAX", 3 * 4096)

    async def scenario(b: Bench) -> None:
        for _ in range(3):  # closed regions count no more
            regions = [Region(4096) for _ in range(5)]
            await b.call(FILL, sinks=[region.slice(0, 4096) for region in regions])
            for number, region in enumerate(regions, start=1):
                assert bytes(region.view) == bytes([number]) * 4096
                region.close()

    uvloop.run(bounded(scenario, "shm"))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("scenario", BASICS, ids=lambda s: s.__name__)
def test_on_plain_asyncio(scenario: Scenario, transport: str) -> None:
    asyncio.run(bounded(scenario, transport))
