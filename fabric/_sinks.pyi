from collections.abc import Mapping

from typing_extensions import Buffer

def survey(
    descriptors: Buffer, regions: Mapping[int, memoryview], /
) -> tuple[int, int, int, dict[int, memoryview]]: ...
