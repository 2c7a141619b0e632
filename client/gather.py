"""Run several operations at once and see all of them end."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def gather_all(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all concurrently; when all have ended, raise the first error or return the results.

    Nothing of it runs any more on return, also after an error or when the caller is cancelled.
    """
    if len(works) == 1:
        return [await works[0]]
    found = await asyncio.gather(*works, return_exceptions=True)
    results: list[T] = []
    for result in found:
        if isinstance(result, BaseException):
            raise result
        results.append(result)
    return results
