import asyncio
from collections.abc import AsyncIterator

import pytest

from pipelines.serve.merging import merged, together


async def _counting(name: str, count: int, closed: list[str]) -> AsyncIterator[str]:
    try:
        for index in range(count):
            await asyncio.sleep(0)
            yield f"{name}{index}"
    finally:
        closed.append(name)


def test_every_event_of_every_stream_in_its_order() -> None:
    async def run() -> list[tuple[int, str]]:
        streams = [_counting(name, count, []) for name, count in (("a", 3), ("b", 0), ("c", 5))]
        return [event async for event in merged(streams)]

    events = asyncio.run(run())
    assert [text for index, text in events if index == 0] == ["a0", "a1", "a2"]
    assert [text for index, text in events if index == 2] == [f"c{index}" for index in range(5)]
    assert len(events) == 8


def test_an_error_of_one_ends_all() -> None:
    async def broken() -> AsyncIterator[str]:
        yield "first"
        raise ValueError("broken")

    async def run() -> None:
        async for _ in merged([broken(), _counting("a", 10**6, [])]):
            pass

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(run())


def test_nothing_is_asked_for_after_the_reader_has_left() -> None:
    asked = []

    async def endless() -> AsyncIterator[int]:
        index = 0
        while True:
            index += 1
            asked.append(index)
            yield index
            await asyncio.sleep(0)

    async def run() -> None:
        stream = merged([endless()])
        async for _, value in stream:
            if value == 3:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        before = len(asked)
        await asyncio.sleep(0.01)
        assert len(asked) == before

    asyncio.run(run())


def test_results_come_in_their_order_and_an_error_ends_the_others() -> None:
    ended: list[str] = []

    async def slow(name: str) -> str:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(name)
        return name

    async def soon(value: int) -> int:
        await asyncio.sleep(0.001 * (3 - value))
        return value

    async def broken() -> str:
        await asyncio.sleep(0)
        raise ValueError("broken")

    async def run() -> None:
        assert await together(soon(value) for value in range(3)) == [0, 1, 2]
        with pytest.raises(ValueError, match="broken"):
            await together([slow("a"), broken(), slow("b")])
        assert sorted(ended) == ["a", "b"]

    asyncio.run(run())
