"""Goodput: how many requests a second are done in time, by step-level batching and by ``@serve.batch``."""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from jobs.bench.serve_load import Arrival, Outcome, offer, poisson, quantile
from jobs.bench.serve_model import bench_card, bench_request
from ldm.model_card import ModelCard

__all__ = ["Goodput", "goodput", "short_p99"]

# A request is in time within so many times what it takes alone, and a rate is sustained while so many are.
SLOWDOWN, IN_TIME = 5.0, 0.9
MAX_BATCH, MAX_ONGOING = 16, 1000
BATCH = f"batch-{MAX_BATCH}"
GIVE_UP_S = 60.0
# Of the search: rates are this far apart at its end.
FINE = 1.1
MIXED = {10: 1.0, 20: 1.0, 50: 1.0}
UNIFORM = {50: 1.0}
LONG_AND_SHORT = {10: 0.2, 50: 0.8}

Call = Callable[[Arrival], Awaitable[bool]]


@dataclass(frozen=True)
class Goodput:
    """Requests a second that are done in time, at the highest rate at which 90 % are; by way and seed."""

    by_way: Mapping[str, list[float]]

    def ratios(self, way: str, others: Sequence[str]) -> list[float]:
        """Seed by seed, to the best of the others."""
        best = [max(found) for found in zip(*(self.by_way[other] for other in others), strict=True)]
        return [a / b for a, b in zip(self.by_way[way], best, strict=True)]


def goodput(
    preset: str, side: int, steps: Mapping[int, float], ways: tuple[str, ...], seeds: int, seconds: float
) -> Goodput:
    """Of every way; seeds: of arrivals. Needs a connected Ray."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    with _deployed(preset, side, ways) as (calls, solo_s):
        mean_s = sum(num_steps * weight for num_steps, weight in steps.items()) / sum(steps.values()) * solo_s
        for seed in range(seeds):
            for way in ways if seed % 2 == 0 else reversed(ways):
                start = found[way][-1] if found[way] else 0.5 / mean_s
                found[way].append(_search(calls[way], steps, solo_s, start, seed, seconds))
                print(f"  {way:10} seed {seed}: {found[way][-1]:.2f} in time a second", flush=True)
    return Goodput(found)


def short_p99(preset: str, side: int, seeds: int, seconds: float) -> dict[str, float]:
    """99th percentile of requests of 10 steps among such of 50, median over seeds.

    At half of the load that full batches carry; and ``calm``, at the highest that ``@serve.batch`` sustains.
    """
    figures: dict[str, float] = {}
    with _deployed(preset, side, ("engine", BATCH)) as (calls, solo_s):
        mean_steps = sum(steps * weight for steps, weight in LONG_AND_SHORT.items())
        calm = _search(calls[BATCH], LONG_AND_SHORT, solo_s, 0.5 / (mean_steps * solo_s), 0, seconds)
        busy = asyncio.run(_steps_per_s(calls["engine"])) / mean_steps / 2
        for name, rate in (("short", busy), ("short_calm", calm)):
            engine_s, batch_s = (
                median(_short_p99_s(call, rate, seed, seconds) for seed in range(seeds))
                for call in (calls["engine"], calls[BATCH])
            )
            figures |= {
                f"{name}_rate": rate,
                f"{name}_p99_engine_s": engine_s,
                f"{name}_p99_batch_s": batch_s,
            }
            figures[f"{name}_p99_gain"] = batch_s / engine_s
    return figures


def _short_p99_s(call: Call, rate: float, seed: int, seconds: float) -> float:
    outcomes = asyncio.run(offer(call, poisson(rate, seconds, LONG_AND_SHORT, seed), GIVE_UP_S))
    return quantile([o.latency_s for o in outcomes if o.arrival.num_steps == 10], 0.99)


async def _steps_per_s(call: Call, steps: int = 20) -> float:
    """Of full batches."""
    start = time.perf_counter()
    await asyncio.gather(*(call(Arrival(0.0, steps, seed)) for seed in range(3 * MAX_BATCH)))
    return 3 * MAX_BATCH * steps / (time.perf_counter() - start)


def _search(
    call: Call, steps: Mapping[int, float], solo_s: float, start: float, seed: int, seconds: float
) -> float:
    """The best goodput of a rate that is sustained, found by doubling and halving."""

    def probe(rate: float) -> float | None:
        outcomes = asyncio.run(
            offer(call, poisson(rate, seconds, steps, seed), SLOWDOWN * max(steps) * solo_s)
        )
        in_time = sum(_is_in_time(outcome, solo_s) for outcome in outcomes)
        return in_time / seconds if outcomes and in_time >= IN_TIME * len(outcomes) else None

    low, high, best, rate = 0.0, inf, 0.0, start
    while high > FINE * low:
        sustained = probe(rate)
        if sustained is None:
            high = rate
        else:
            low, best = rate, max(best, sustained)
        rate = 2 * low if high == inf else high / 2 if low == 0 else (low * high) ** 0.5
    return best


def _is_in_time(outcome: Outcome, solo_s: float) -> bool:
    return not outcome.refused and outcome.latency_s <= SLOWDOWN * outcome.arrival.num_steps * solo_s


@contextmanager
def _deployed(preset: str, side: int, ways: tuple[str, ...]) -> Iterator[tuple[dict[str, Call], float]]:
    """What does a request, by way; and the seconds of a step of one that is alone."""
    from ray import serve

    with tempfile.TemporaryDirectory() as folder:
        card = bench_card(Path(folder), preset, side)
        handles = {way: serve.run(_application(way, card), name=way, route_prefix=None) for way in ways}
        try:
            calls = {way: _caller(way, handle, card) for way, handle in handles.items()}
            for call in calls.values():
                asyncio.run(_warm_up(call))
            yield calls, _solo_s(calls[ways[-1]])
        finally:
            for way in ways:
                serve.delete(way)


def _application(way: str, card: ModelCard) -> Any:
    from ray import serve

    from jobs.bench.serve_batch_way import BatchSampler
    from pipelines.serve.config import SamplerPool
    from pipelines.serve.sampler import Sampler

    deployed: Any = serve.deployment(max_ongoing_requests=MAX_ONGOING)
    if way == "engine":
        pool = SamplerPool(threads=1, max_rows=2 * MAX_BATCH, max_ongoing=MAX_ONGOING)
        return deployed(Sampler).bind({"bench": card}, {}, pool)
    return deployed(BatchSampler).bind(card, int(way.removeprefix("batch-")), 1)


def _caller(way: str, handle: Any, card: ModelCard) -> Call:
    from pipelines.serve.messages import Rejected

    if way == "engine":
        stream = handle.options(stream=True, multiplexed_model_id="bench")

        async def call(arrival: Arrival) -> bool:
            response = stream.sample.remote(bench_request(card, arrival.num_steps, arrival.seed))
            try:
                async for event in response:
                    if isinstance(event, Rejected):
                        return True
                return False
            finally:
                response.cancel()
    else:

        async def call(arrival: Arrival) -> bool:
            response = handle.sample.remote(bench_request(card, arrival.num_steps, arrival.seed))
            try:
                await response
                return False
            finally:
                response.cancel()

    return call


async def _warm_up(call: Call) -> None:
    await asyncio.gather(*(call(Arrival(0.0, 5, seed)) for seed in range(MAX_BATCH)))


def _solo_s(call: Call, steps: int = 50, rounds: int = 3) -> float:
    seconds = []
    for index in range(rounds):
        start = time.perf_counter()
        asyncio.run(_once(call, steps, index))
        seconds.append((time.perf_counter() - start) / steps)
    return median(seconds)


async def _once(call: Call, steps: int, seed: int) -> None:
    await call(Arrival(0.0, steps, seed))
