from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import Buffer

def read_plainly(
    operations: Buffer,
    descriptors: Buffer,
    regions: Mapping[int, memoryview],
    streamed: Buffer,
    admit: Callable[[int, int], tuple[Any, ...] | None],
    /,
) -> tuple[bytes, bytes]: ...
