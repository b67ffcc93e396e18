import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from pipelines.serve.hold_off import CROWDED_S, HOLD_S, HoldOff
from pipelines.serve.messages import Accepted, Rejected, Sampled, SampleEvent
from pipelines.serve.tickets import Reason


class Sampler:
    """Takes ``room`` requests, each until it is told to `finish`; counts how often it was asked."""

    def __init__(self, room: int) -> None:
        self.room, self.asked, self.asking, self.most_asking = room, 0, 0, 0
        self.accepted, self.ending = 0, asyncio.Event()
        self.reason: Reason = "full"

    async def sample(self) -> AsyncIterator[SampleEvent]:
        self.asked += 1
        self.asking += 1
        self.most_asking = max(self.most_asking, self.asking)
        await asyncio.sleep(0.001)
        self.asking -= 1
        if self.accepted == self.room:
            yield Rejected(self.reason, 3.0)
            return
        self.accepted += 1
        try:
            yield Accepted()
            await self.ending.wait()
        finally:
            self.accepted -= 1
        yield Sampled(np.zeros((4, 8, 8), np.float32))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def _all(events: AsyncIterator[SampleEvent]) -> list[type]:
    return [type(event) async for event in events]


def test_a_known_no_is_said_without_asking() -> None:
    async def run() -> None:
        held: list[None] = []
        sampler, hold_off = Sampler(room=0), HoldOff(lambda: held.append(None))
        for _ in range(50):
            assert await _all(hold_off.events(sampler.sample)) == [Rejected]
        assert sampler.asked == 1 and len(held) == 49
        assert hold_off.refusal() == Rejected("full", 3.0)

    asyncio.run(run())


def test_whoever_comes_after_one_of_ours_has_ended_asks() -> None:
    async def run() -> None:
        sampler, hold_off = Sampler(room=1), HoldOff()
        first = asyncio.create_task(_all(hold_off.events(sampler.sample)))
        await asyncio.sleep(0.01)
        assert await _all(hold_off.events(sampler.sample)) == [Rejected]
        sampler.ending.set()
        assert await first == [Accepted, Sampled]
        assert await _all(hold_off.events(sampler.sample)) == [Accepted, Sampled]
        assert sampler.asked == 3

    asyncio.run(run())


def test_one_that_is_given_up_has_ended() -> None:
    async def run() -> None:
        sampler, hold_off = Sampler(room=1), HoldOff()
        events = hold_off.events(sampler.sample)
        assert await anext(events) == Accepted()
        assert await _all(hold_off.events(sampler.sample)) == [Rejected]
        await events.aclose()  # type: ignore[attr-defined]
        assert sampler.accepted == 0 and hold_off.refusal() is None

    asyncio.run(run())


@pytest.mark.parametrize("many", [2, 20])
def test_in_a_crowd_one_no_answers_all_who_wait(many: int) -> None:
    async def run() -> None:
        clock = Clock()
        sampler, hold_off = Sampler(room=0), HoldOff(clock=clock)
        assert await _all(hold_off.events(sampler.sample)) == [Rejected]
        clock.now += (HOLD_S + CROWDED_S) / 2
        answers = await asyncio.gather(*(_all(hold_off.events(sampler.sample)) for _ in range(many)))
        assert answers == [[Rejected]] * many
        assert sampler.asked == 2

    asyncio.run(run())


def test_in_a_crowd_as_many_are_accepted_as_there_is_room_for() -> None:
    async def run() -> None:
        clock = Clock()
        sampler, hold_off = Sampler(room=0), HoldOff(clock=clock)
        assert await _all(hold_off.events(sampler.sample)) == [Rejected]
        clock.now += (HOLD_S + CROWDED_S) / 2
        sampler.room = 3
        tasks = [asyncio.create_task(_all(hold_off.events(sampler.sample))) for _ in range(10)]
        await asyncio.sleep(0.1)
        sampler.ending.set()
        answers = await asyncio.gather(*tasks)
        assert answers.count([Accepted, Sampled]) == 3 and answers.count([Rejected]) == 7
        assert sampler.most_asking == 1

    asyncio.run(run())


def test_where_nobody_was_refused_lately_none_waits_for_another() -> None:
    async def run() -> None:
        sampler, hold_off = Sampler(room=8), HoldOff()
        sampler.ending.set()
        await asyncio.gather(*(_all(hold_off.events(sampler.sample)) for _ in range(8)))
        assert sampler.most_asking == 8

    asyncio.run(run())


def test_a_no_is_forgotten_in_time() -> None:
    async def run() -> None:
        clock = Clock()
        sampler, hold_off = Sampler(room=0), HoldOff(clock=clock)
        assert await _all(hold_off.events(sampler.sample)) == [Rejected]
        clock.now += HOLD_S / 2
        assert hold_off.refusal() is not None
        clock.now += HOLD_S
        assert hold_off.refusal() is None

    asyncio.run(run())


def test_a_deadline_that_cannot_be_met_is_nobody_elses() -> None:
    async def run() -> None:
        sampler, hold_off = Sampler(room=0), HoldOff()
        sampler.reason = "deadline"
        for _ in range(3):
            assert await _all(hold_off.events(sampler.sample)) == [Rejected]
        assert sampler.asked == 3

    asyncio.run(run())
