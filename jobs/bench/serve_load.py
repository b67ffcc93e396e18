"""Requests that come at random, as a Poisson process has it, and when each was done.

The load is open: who comes does not wait for who is there. Latency counts from when a request was to come.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Arrival", "Outcome", "offer", "poisson", "quantile"]


@dataclass(frozen=True)
class Arrival:
    """A request of ``num_steps``, ``at_s`` after the beginning; ``seed`` of its image."""

    at_s: float
    num_steps: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """``latency_s``: infinite for one that was not done; ``refused``: told so, after that time."""

    arrival: Arrival
    latency_s: float
    refused: bool = False


# Does one request; True if it was refused.
Call = Callable[[Arrival], Awaitable[bool]]


def poisson(rate: float, seconds: float, steps: Mapping[int, float], seed: int) -> list[Arrival]:
    """Arrivals at ``rate`` a second; ``steps``: number of steps → its weight."""
    rng = random.Random(f"{seed} {rate}")
    arrivals, at_s = list[Arrival](), 0.0
    while (at_s := at_s + rng.expovariate(rate)) < seconds:
        num_steps = rng.choices(list(steps), list(steps.values()))[0]
        arrivals.append(Arrival(at_s, num_steps, rng.randrange(2**31)))
    return arrivals


async def offer(call: Call, arrivals: Sequence[Arrival], patience_s: float) -> list[Outcome]:
    """Make every request when it is to come; one is given up ``patience_s`` after the last."""
    begin = time.perf_counter()

    async def one(arrival: Arrival) -> Outcome:
        await asyncio.sleep(max(0.0, begin + arrival.at_s - time.perf_counter()))
        refused = await call(arrival)
        return Outcome(arrival, time.perf_counter() - begin - arrival.at_s, refused)

    tasks = [asyncio.create_task(one(arrival)) for arrival in arrivals]
    last_s = arrivals[-1].at_s if arrivals else 0.0
    done, late = await asyncio.wait(tasks, timeout=last_s + patience_s)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late)
    return [
        task.result() if task in done else Outcome(arrival, math.inf)
        for task, arrival in zip(tasks, arrivals, strict=True)
    ]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]
