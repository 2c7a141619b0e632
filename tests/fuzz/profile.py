"""How much a fuzz test tries: bounded and always the same in CI, open-ended on request.

EMBERFS_FUZZ=long       fresh random examples, 50 times as many
EMBERFS_FUZZ=ci         (default) the same examples in every run, the whole folder in about a minute
"""

import os

from hypothesis import HealthCheck, settings

LONG = os.environ.get("EMBERFS_FUZZ", "ci") == "long"
LONG_FACTOR = 50


def budget(examples: int) -> settings:
    """Decorate a test that tries `examples` inputs in CI."""
    return settings(
        max_examples=examples * LONG_FACTOR if LONG else examples,
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
