"""Several things that go on at the same time, and end together."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

__all__ = ["merged", "together"]

Event = TypeVar("Event")
Result = TypeVar("Result")


async def together(calls: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results in their order. The first error ends all, and is raised when they have ended."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def merged(streams: Sequence[AsyncIterator[Event]]) -> AsyncIterator[tuple[int, Event]]:
    """(index of the stream, event), as they come. The first error of any ends all of them."""
    coming: dict[asyncio.Task[Event], int] = {}

    def ask(index: int) -> None:
        coming[asyncio.ensure_future(anext(streams[index]))] = index

    for index in range(len(streams)):
        ask(index)
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=coming.__getitem__):
                index = coming.pop(task)
                if isinstance(task.exception(), StopAsyncIteration):
                    continue
                yield index, task.result()
                ask(index)
    finally:
        for task in coming:
            task.cancel()
        if coming:
            await asyncio.wait(coming)
