"""A whole server under more load than it can carry, over HTTP: refusals, latency, and what comes after."""

import asyncio
import time
from dataclasses import dataclass

import httpx

from jobs.bench.serve_load import Arrival, Outcome, offer, poisson, quantile
from jobs.bench.serve_model import bench_server
from pipelines.serve.config import SamplerPool, StagePool

__all__ = ["overload"]

STEPS = {20: 1.0}
TIMEOUT_S = 120.0
# After the overload.
WATCH_S = 20.0
# Of the sampler: who would be slower than so many times its time alone is refused.
MAX_SLOWDOWN = 1.8


@dataclass(frozen=True)
class Answers:
    """Latencies of accepted requests and of refused ones, and how many were lost: neither answered so."""

    accepted_s: list[float]
    refused_s: list[float]
    lost: int
    without_retry_after: int


class Client:
    """Makes a request of so many steps, and notes how it was answered."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self._http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)
        self.statuses: dict[int, int] = {}
        self.without_retry_after = 0

    async def __call__(self, arrival: Arrival) -> bool:
        body = {"seed": arrival.seed, "num_inference_steps": arrival.num_steps, "class_label": 0}
        answer = await self._http.post("/v1/images/generations", json=body)
        self.statuses[answer.status_code] = self.statuses.get(answer.status_code, 0) + 1
        self.without_retry_after += answer.status_code == 429 and "retry-after" not in answer.headers
        return answer.status_code == 429

    async def close(self) -> None:
        await self._http.aclose()


def overload(preset: str, side: int, factor: float, seconds: float) -> dict[str, float]:
    """Load of ``factor`` times what the server can do, for ``seconds``. Needs a connected Ray."""
    sampler = SamplerPool(threads=1, max_slowdown=MAX_SLOWDOWN, max_ongoing=1000)
    with bench_server(preset, side, sampler, StagePool(threads=1)) as url:
        return asyncio.run(_overload(url, factor, seconds))


async def _overload(url: str, factor: float, seconds: float) -> dict[str, float]:
    solo_s = await _solo_s(url)
    calm_rate = 0.1 / solo_s
    before = await _offered(url, calm_rate, max(seconds, 10 / calm_rate), seed=0)
    # What it can do is known from what it does when there is more.
    capacity = len((await _offered(url, 4 / solo_s, 10.0, seed=1)).accepted_s) / 10.0
    during = await _offered(url, factor * capacity, seconds, seed=2)
    recovery_s = await _recovery(url, quantile(before.accepted_s, 0.99))
    unloaded_s = quantile(before.accepted_s, 0.99)
    return {
        "capacity_per_s": capacity,
        "offered_per_s": factor * capacity,
        "solo_s": solo_s,
        "unloaded_p99_s": unloaded_s,
        "accepted_p99_over_unloaded": quantile(during.accepted_s, 0.99) / unloaded_s,
        "accepted_per_s": len(during.accepted_s) / seconds,
        "reject_p50_ms": 1000 * quantile(during.refused_s, 0.5),
        "reject_p99_ms": 1000 * quantile(during.refused_s, 0.99),
        "rejected": float(len(during.refused_s)),
        "without_retry_after": float(during.without_retry_after),
        "lost": float(during.lost),
        "recovery_s": recovery_s,
    }


async def _solo_s(url: str) -> float:
    client, seconds = Client(url), []
    for seed in range(5):
        start = time.perf_counter()
        await client(Arrival(0.0, next(iter(STEPS)), 10_000 + seed))
        seconds.append(time.perf_counter() - start)
    await client.close()
    return min(seconds)


async def _offered(url: str, rate: float, seconds: float, seed: int) -> Answers:
    client = Client(url)
    outcomes = await offer(client, poisson(rate, seconds, STEPS, seed), TIMEOUT_S)
    await client.close()
    answered = client.statuses.get(200, 0) + client.statuses.get(429, 0)
    return Answers(
        [outcome.latency_s for outcome in outcomes if _is_done(outcome)],
        [outcome.latency_s for outcome in outcomes if outcome.refused],
        len(outcomes) - answered,
        client.without_retry_after,
    )


def _is_done(outcome: Outcome) -> bool:
    return not outcome.refused and outcome.latency_s < TIMEOUT_S


async def _recovery(url: str, normal_s: float) -> float:
    """Seconds until the last request that was refused, or slower than they were before.

    One after the other, so that none of them is refused because of another one.
    """
    client, begin, recovered_s = Client(url), time.perf_counter(), 0.0
    while (sent_s := time.perf_counter() - begin) < WATCH_S:
        refused = await client(Arrival(0.0, next(iter(STEPS)), 20_000 + round(1000 * sent_s)))
        answered_s = time.perf_counter() - begin
        if refused or answered_s - sent_s > 2 * normal_s:
            recovered_s = answered_s
    await client.close()
    return recovered_s
