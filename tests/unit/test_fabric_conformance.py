"""Every scenario over every transport on uvloop, the basics on plain asyncio too."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from unit.fabric_conformance import BASICS, SCENARIOS, TRANSPORTS, Bench, bench

Scenario = Callable[[Bench], Awaitable[None]]
Run = Callable[[Coroutine[Any, Any, None]], None]


async def bounded(scenario: Scenario, transport: str) -> None:
    async with asyncio.timeout(20), bench(transport) as made:
        await scenario(made)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_on_uvloop(scenario: Scenario, transport: str) -> None:
    uvloop.run(bounded(scenario, transport))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("scenario", BASICS, ids=lambda s: s.__name__)
def test_on_plain_asyncio(scenario: Scenario, transport: str) -> None:
    asyncio.run(bounded(scenario, transport))
