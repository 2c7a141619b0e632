from collections.abc import Mapping

from typing_extensions import Buffer

def survey(
    entries: Buffer, regions: Mapping[int, bytes], /
) -> tuple[bytes, list[tuple[int, int, int]]]: ...
def plan(
    entries: Buffer,
    states: Buffer,
    regions: Mapping[int, bytes],
    files: Mapping[int, tuple[bytes, bytes]],
    costs: Buffer,
    bytes_max: int,
    turn: int,
    /,
) -> tuple[list[tuple[int, bytes, bytes, bytes, int, list[int]]], bytes]: ...
def settle(
    entries: Buffer, places: Buffer, results: Buffer, filled: Buffer, /
) -> tuple[bytes, bytes, bytes]: ...
