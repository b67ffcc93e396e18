"""The engine without Ray: what it costs beside a bare loop; previews, deadlines and cancels."""

import asyncio
import math
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from jobs.bench.serve_load import Arrival, Outcome, offer, poisson
from jobs.bench.serve_model import bench_card, bench_request
from ldm import unet
from ldm.model_card import ModelCard
from ldm.sampling import denoise_step
from pipelines.serve.engine import Engine
from pipelines.serve.loaded_model import LoadedModel, trajectory
from pipelines.serve.step_costs import LatentShape
from pipelines.serve.tickets import Observer, Reason, Refused, Ticket, TooLate

__all__ = ["cancels", "deadlines", "efficiency", "first_preview", "loaded_model"]

STEPS = 20
MAX_ROWS = 32
MIXED = {10: 1.0, 20: 1.0, 50: 1.0}
# Requests have to be done within so many times what they take alone.
DEADLINES = (1.5, 4.0)
# Of what the engine can do in full batches; the first is the one at which it is compared.
LOADS = (1.5, 1.0, 2.0, 4.0)


class FirstInFirstOut(Engine):
    """The same engine without deadlines in its order, and without refusals: what most servers do."""

    def _first_due(self, shape: LatentShape) -> list[Ticket]:
        room = self._costs.best_rows(shape)
        batch: list[Ticket] = []
        for ticket in self._tickets[shape]:
            if not batch or ticket.work.rows <= room:
                batch.append(ticket)
                room -= ticket.work.rows
        return batch

    def _objection(self, ticket: Ticket, now: float) -> Reason | None:
        return "full" if self.num_requests >= self.max_requests else None


def efficiency(preset: str, side: int, rounds: int) -> dict[str, float]:
    """Rows a second of a saturated engine over those of a bare loop; and of one with previews over without.

    All in turns, with the same rows in a call.
    """
    with _model(preset, side) as (card, model):
        return asyncio.run(_efficiency(card, model, rounds))


async def _efficiency(card: ModelCard, model: torch.nn.Module, rounds: int) -> dict[str, float]:
    async with loaded_model(card) as loaded:
        batch = loaded.engine._costs.best_rows(card.latent_shape) // 2
        # Short, so that a machine that slows down slows what is compared with it.
        count = 2 * batch

        async def engine(preview_every: int) -> None:
            requests = [
                bench_request(card, STEPS, seed, preview_every=preview_every) for seed in range(count)
            ]
            tickets = [await loaded.engine.submit(loaded.work(request, None)) for request in requests]
            await asyncio.gather(*(ticket.done for ticket in tickets))

        async def bare() -> None:
            loop, thread = asyncio.get_running_loop(), loaded.engine._thread
            await loop.run_in_executor(thread, partial(_bare, loaded, model, count, batch))

        ways: dict[str, Callable[[], Awaitable[None]]] = {
            "bare": bare,
            "engine": lambda: engine(0),
            "previews": lambda: engine(STEPS // 5),
        }
        seconds = await _in_turns(ways, rounds)
    return {
        "engine_efficiency": _ratio(seconds["bare"], seconds["engine"]),
        "preview_cost": _ratio(seconds["previews"], seconds["engine"]) - 1,
        "rows_in_a_call": float(2 * batch),
    }


def _bare(loaded: LoadedModel, model: torch.nn.Module, count: int, batch: int) -> None:
    for start in range(0, count, batch):
        requests = [bench_request(loaded.card, STEPS, seed) for seed in range(start, start + batch)]
        trajectories = [trajectory(loaded.card, request) for request in requests]
        while not trajectories[0].done:
            denoise_step(model, trajectories)


def _ratio(a: list[float], b: list[float]) -> float:
    """Median over rounds."""
    return median(first / second for first, second in zip(a, b, strict=True))


async def _in_turns(ways: dict[str, Callable[[], Awaitable[None]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, every other one backwards; a round before those is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name in list(ways) if index % 2 == 0 else reversed(list(ways)):
            start = time.perf_counter()
            await ways[name]()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def first_preview(preset: str, side: int, rounds: int) -> dict[str, float]:
    """When the first preview of an image of 50 steps comes, as a share of the time that the image takes."""

    async def run(card: ModelCard) -> list[float]:
        shares = []
        async with loaded_model(card) as loaded:
            for seed in range(rounds):
                start = time.perf_counter()
                request = bench_request(card, 50, seed, preview_every=5)
                ticket = await loaded.engine.submit(loaded.work(request, None))
                first_s = math.nan
                async for update in ticket.updates():
                    if update.preview is not None and math.isnan(first_s):
                        first_s = time.perf_counter() - start
                await ticket.done
                shares.append(first_s / (time.perf_counter() - start))
        return shares

    with _model(preset, side) as (card, _):
        return {"first_preview": median(asyncio.run(run(card)))}


async def _submitted(loaded: LoadedModel, num_steps: int, seed: int, preview_every: int = 0) -> Ticket:
    request = bench_request(loaded.card, num_steps, seed, preview_every=preview_every)
    return await loaded.engine.submit(loaded.work(request, None))


class _Cancelled(Observer):
    """Counts the cancelled."""

    def __init__(self) -> None:
        self.count = 0

    def cancelled(self, *, steps: int) -> None:
        self.count += 1


def cancels(preset: str, side: int, count: int) -> dict[str, float]:
    """Clients that leave beside others that stay: steps still taken for them, and harm done."""
    with _model(preset, side) as (card, _):
        return asyncio.run(_cancels(card, count))


async def _cancels(card: ModelCard, count: int) -> dict[str, float]:
    observer, extra, harmed = _Cancelled(), list[int](), 0
    async with loaded_model(card, observer) as loaded:
        staying = [
            await loaded.engine.submit(loaded.work(bench_request(card, STEPS, seed), None))
            for seed in range(4)
        ]

        async def leaver(seed: int) -> None:
            ticket = await _submitted(loaded, 1000, seed)
            at = seed % 7
            while ticket.steps_taken < at:
                await asyncio.sleep(0)
                await asyncio.wait_for(ticket._changed.wait(), 600)
                ticket._changed.clear()
            ticket.cancel()
            before = ticket.steps_taken
            await asyncio.sleep(0.05)
            extra.append((0 if ticket.trajectory is None else ticket.trajectory.step_index) - before)

        for start in range(0, count, 8):
            await asyncio.gather(*(leaver(seed) for seed in range(start, min(count, start + 8))))
        latents = await asyncio.gather(*(ticket.done for ticket in staying))
        for seed, latent in enumerate(latents):
            alone = await _submitted(loaded, STEPS, seed)
            harmed += not torch.allclose(await alone.done, latent, rtol=1e-3, atol=1e-4)
        await asyncio.sleep(0.1)
        left = loaded.engine.num_requests
    return {
        "cancel_extra_steps": float(max(extra)),
        "cancelled": float(observer.count),
        "cancel_leaks": float(left),
        "cancel_harmed": float(harmed),
    }


def deadlines(preset: str, side: int, seeds: int, seconds: float) -> dict[str, float]:
    """Requests in time a second: earliest deadline and refusal over first in, first out; and at overload.

    The first comparison is at 1.5 times the load that the engine can carry; its own peak is the best of any.
    """
    with _model(preset, side) as (card, model):
        return asyncio.run(_deadlines(card, model, seeds, seconds))


async def _deadlines(card: ModelCard, model: torch.nn.Module, seeds: int, seconds: float) -> dict[str, float]:
    gains, shares = list[float](), list[float]()
    mean_steps = sum(steps * weight for steps, weight in MIXED.items()) / sum(MIXED.values())
    async with loaded_model(card) as ours, loaded_model(card, kind=FirstInFirstOut) as theirs:
        for seed in range(seeds):
            # Anew each time: the machine's speed changes.
            full = await _full_batches(ours)
            rates = {load: load * full.steps_per_s / mean_steps for load in LOADS}
            found = {load: await _goodput(ours, rates[load], seed, seconds, full.step_s) for load in LOADS}
            first_out = await _goodput(theirs, rates[LOADS[0]], seed, seconds, full.step_s)
            gains.append(found[LOADS[0]] / max(first_out, 1e-9))
            shares.append(found[LOADS[-1]] / max(*found.values(), 1e-9))
            told = ", ".join(f"{load}: {goodput:.1f}" for load, goodput in found.items())
            print(f"  seed {seed}, in time a second by load: {told}; FIFO {first_out:.1f}", flush=True)
    return {
        "deadline_gain": median(gains),
        "deadline_gain_min": min(gains),
        "overload_goodput": median(shares),
        "overload_goodput_min": min(shares),
    }


class _Full(NamedTuple):
    """Of an engine whose batches are full: steps of all requests a second, and seconds of a step."""

    steps_per_s: float
    step_s: float


async def _full_batches(loaded: LoadedModel) -> _Full:
    lanes = loaded.engine._costs.best_rows(loaded.card.latent_shape) // 2
    start = time.perf_counter()
    tickets = [await _submitted(loaded, STEPS, seed) for seed in range(3 * lanes)]
    await asyncio.gather(*(ticket.done for ticket in tickets))
    step_s = (time.perf_counter() - start) / (3 * STEPS)
    return _Full(lanes / step_s, step_s)


async def _goodput(loaded: LoadedModel, rate: float, seed: int, seconds: float, step_s: float) -> float:
    def allowed_s(arrival: Arrival) -> float:
        low, high = DEADLINES
        return (low + (high - low) * (arrival.seed % 1000) / 1000) * arrival.num_steps * step_s

    async def call(arrival: Arrival) -> bool:
        request = bench_request(loaded.card, arrival.num_steps, arrival.seed)
        deadline_s = None if isinstance(loaded.engine, FirstInFirstOut) else allowed_s(arrival)
        try:
            ticket = await loaded.engine.submit(loaded.work(request, deadline_s))
            await ticket.done
        except (Refused, TooLate):
            return True
        return False

    arrivals = poisson(rate, seconds, MIXED, seed)
    due = {arrival.seed: allowed_s(arrival) for arrival in arrivals}
    outcomes = await offer(call, arrivals, max(due.values()))
    return sum(_in_time(outcome, due) for outcome in outcomes) / seconds


def _in_time(outcome: Outcome, due: dict[int, float]) -> bool:
    return not outcome.refused and outcome.latency_s <= due[outcome.arrival.seed]


@contextmanager
def _model(preset: str, side: int) -> Iterator[tuple[ModelCard, torch.nn.Module]]:
    with tempfile.TemporaryDirectory() as folder:
        card = bench_card(Path(folder), preset, side)
        yield card, unet.load(card.folder).eval()


@asynccontextmanager
async def loaded_model(
    card: ModelCard,
    observer: Observer | None = None,
    *,
    kind: type[Engine] = Engine,
    max_requests: int = 10_000,
) -> AsyncIterator[LoadedModel]:
    """In this process, on the CPU."""
    with ThreadPoolExecutor(1) as thread:
        loaded = await LoadedModel.open(
            card,
            None,
            torch.device("cpu"),
            thread,
            max_rows=MAX_ROWS,
            max_requests=max_requests,
            observer=observer,
            engine=kind,
        )
        yield loaded
        await loaded.close()
