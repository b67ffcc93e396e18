"""The sampler stage: replicas that batch by step, and say how much work they have left."""

import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import torch
from ray import serve

from ldm.model_card import ModelCard
from pipelines.device import pick_device
from pipelines.serve.config import SamplerPool
from pipelines.serve.device_thread import device_thread, switch_often
from pipelines.serve.loaded_model import LoadedModel
from pipelines.serve.messages import Accepted, Progress, Rejected, Sampled, SampleEvent, SampleRequest
from pipelines.serve.stage_metrics import SamplerMetrics
from pipelines.serve.tickets import Refused, Ticket, TooLate
from pipelines.serve.tracing import current_span, describe
from pipelines.serve.work_left import SECONDS_LEFT, SECONDS_PER_REQUEST

__all__ = ["Sampler"]


class Sampler:
    """Replica: requests → latents. cards, adapters: by model; the first model is there from the start."""

    # Ray Serve waits for it, and routes nothing here before.
    async def __init__(  # type: ignore[misc]
        self, cards: Mapping[str, ModelCard], adapters: Mapping[str, Path], pool: SamplerPool
    ) -> None:
        if pool.threads:
            torch.set_num_threads(pool.threads)
        switch_often()
        self.cards, self.adapters, self.pool = cards, adapters, pool
        self.device = pick_device()
        self.thread = device_thread("unet")
        self.metrics = SamplerMetrics()
        self._per_request_s = 0.0
        self._models: list[LoadedModel] = []

        async def load(model_id: str) -> LoadedModel:
            return await self._open(model_id)

        # Not as a decorator of a method: the number of models comes with the config.
        self._load = serve.multiplexed(max_num_models_per_replica=pool.max_models)(load)
        await self._load(next(iter(cards)))

    async def sample(self, request: SampleRequest) -> AsyncIterator[SampleEvent]:
        """That it was accepted, progress where that was asked for, and the latent; or that it was rejected.

        Whoever stops listening has cancelled.
        """
        span, model = current_span(), await self._load(request.model)
        deadline_s = None if request.deadline is None else request.deadline - time.time()
        try:
            ticket = await model.engine.submit(model.work(request, deadline_s))
        except Refused as refused:
            yield Rejected(refused.reason, refused.retry_after_s)
            return
        try:
            yield Accepted()
            async for event in _events(ticket, model):
                yield event
        finally:
            ticket.cancel()
            describe(
                span,
                model=request.model,
                steps=ticket.steps_taken,
                queue_s=ticket.waited_s,
                batch_rows=ticket.rows_shared / max(1, ticket.steps_taken),
            )

    async def check_health(self) -> None:
        """Ray Serve starts another replica where this raises: an engine has ended."""
        for model in self._models:
            if model.failure is not None:
                raise model.failure

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `pipelines.serve.work_left.WorkLeft`."""
        engines = [model.engine for model in self._models]
        left_s = sum(engine.seconds_left for engine in engines)
        num_requests = sum(engine.num_requests for engine in engines)
        if num_requests:
            self._per_request_s = left_s / num_requests
        self.metrics.left(left_s)
        return {SECONDS_LEFT: left_s, SECONDS_PER_REQUEST: self._per_request_s}

    async def _open(self, model_id: str) -> LoadedModel:
        self._models = [model for model in self._models if not model.is_closed]
        model = await LoadedModel.open(
            self.cards[model_id],
            self.adapters.get(model_id),
            self.device,
            self.thread,
            max_rows=self.pool.max_rows,
            max_requests=self.pool.max_ongoing,
            max_slowdown=self.pool.max_slowdown,
            observer=self.metrics,
        )
        self._models.append(model)
        return model


async def _events(ticket: Ticket, model: LoadedModel) -> AsyncIterator[SampleEvent]:
    if ticket.work.preview_every:
        async for update in ticket.updates():
            if update.preview is not None:
                yield Progress(*update)
    try:
        x_Chw = await ticket.done
    except TooLate:
        yield Rejected("late", 0.0)
        return
    yield Sampled(model.latent_of_vae(x_Chw))
