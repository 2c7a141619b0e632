from typing import Any

from typing_extensions import Buffer

from emberfs.fabric.region import Slice

def pack(
    wanted: list[tuple[Any, int, Any]],
    parts: list[Slice],
    numbers: dict[int, int],
    operation: int,
    user_data: int,
    /,
) -> tuple[bytes, list[int]]: ...
def settle(
    completions: Buffer, batches: dict[int, Any], /
) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]: ...
