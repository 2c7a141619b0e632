"""The product as it is passes every situation; test_mutations.py shows that they can fail."""

import pytest

from sim.situations import enact, load_all
from sim.violation import report


@pytest.mark.parametrize("name", sorted(load_all()))
def test_situation_is_survived(name: str) -> None:
    found = enact(name).violations
    assert not found, report(found)
