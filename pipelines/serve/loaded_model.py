"""A model on a device with an engine of its own: what a sampler replica holds of each model."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm import lora, unet
from ldm.conditioning import Conditioning
from ldm.editing import first_step
from ldm.model_card import ModelCard
from ldm.sampling import Trajectory, denoise_step
from pipelines.serve.engine import Engine
from pipelines.serve.messages import SampleRequest
from pipelines.serve.step_costs import LatentShape, StepCosts, timed
from pipelines.serve.tickets import Observer, Work

__all__ = ["LoadedModel", "trajectory"]

# Steps of the trajectories that calls are timed with.
TIMED_STEPS = 20


class LoadedModel:
    """U-Net, preview and `Engine`, in an event loop; `open` makes one."""

    def __init__(self, card: ModelCard, engine: Engine, device: torch.device) -> None:
        self.card, self.engine, self.device = card, engine, device
        self.preview = card.latent_preview
        self._running = asyncio.create_task(engine.run())

    @classmethod
    async def open(
        cls,
        card: ModelCard,
        adapter: Path | None,
        device: torch.device,
        thread: ThreadPoolExecutor,
        *,
        max_rows: int,
        max_requests: int,
        max_slowdown: float | None = None,
        observer: Observer | None = None,
        engine: type[Engine] = Engine,
    ) -> "LoadedModel":
        """Load, and measure what calls cost at the size that the model was trained on.

        adapter: folder of a LoRA, or None. thread: in which torch is called, shared by a device's models.
        """
        loop = asyncio.get_running_loop()
        model = await loop.run_in_executor(thread, _load_unet, card, adapter, device)
        step = partial(denoise_step, model)
        costs = StepCosts(timed(step, partial(_for_timing, card, device)), max_rows)
        await loop.run_in_executor(thread, costs.calibrate, card.latent_shape)
        made = engine(
            step,
            costs,
            max_requests=max_requests,
            max_slowdown=max_slowdown,
            observer=observer,
            thread=thread,
        )
        return cls(card, made, device)

    def work(self, request: SampleRequest, deadline_s: float | None) -> Work:
        """What the engine takes. UserError for a request that cannot be sampled."""
        num_steps = self.card.check(request.scheduler, request.num_steps, request.guidance)
        return Work(
            start=partial(trajectory, self.card, request, self.device),
            shape=request.shape,
            num_steps=num_steps - _first_step(request),
            rows=1 if request.guidance == 1.0 else 2,
            deadline_s=deadline_s,
            preview_every=request.preview_every,
            preview=self._draw,
        )

    def latent_of_vae(self, x_Chw: Tensor) -> NDArray[np.float32]:
        """From the U-Net's scale to the VAE's; on the CPU."""
        latent_Chw: NDArray[np.float32] = self.card.whitening.denormalise(x_Chw[None])[0].cpu().numpy()
        return latent_Chw

    @property
    def is_closed(self) -> bool:
        return self._running.done()

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine, if anything but `close` did."""
        is_over = self._running.done() and not self._running.cancelled()
        return self._running.exception() if is_over else None

    async def close(self) -> None:
        """Takes nothing more, ends what it has, and then itself."""
        await self.engine.drain()
        self._running.cancel()

    def __del__(self) -> None:
        # What Ray Serve calls, in another thread, to have a model's memory back. It may not wait here: the
        # collector calls it, too.
        loop = self._running.get_loop()
        if not loop.is_closed() and not self._running.done():
            loop.call_soon_threadsafe(_end, self.engine, self._running)

    def _draw(self, trajectory: Trajectory) -> NDArray[np.uint8]:
        return self.preview(self.card.whitening.denormalise(trajectory.denoised[None])[0])


def trajectory(card: ModelCard, request: SampleRequest, device: torch.device | str = "cpu") -> Trajectory:
    """What a request asks for, before its first step."""
    edit, x0_Chw, mask_hw = request.edit, None, None
    if edit is not None:
        x0_Chw = card.whitening.normalise(torch.tensor(edit.latent_Chw)[None])[0]
        mask_hw = None if edit.mask_hw is None else torch.tensor(edit.mask_hw)
    return Trajectory(
        shape=request.shape,
        scheduler=request.scheduler,
        scheduler_config=card.scheduler_config,
        num_inference_steps=request.num_steps,
        guidance=request.guidance,
        seed=request.seed,
        condition=request.condition.conditioning(),
        null=None if request.null is None else request.null.conditioning(),
        device=device,
        x0=x0_Chw,
        first_step=_first_step(request),
        mask=mask_hw,
        refresh_every=request.refresh_every,
    )


def _first_step(request: SampleRequest) -> int:
    if request.edit is None:
        return 0
    # A small strength of few steps would be none, and nothing to do.
    return min(first_step(request.edit.strength, request.num_steps), request.num_steps - 1)


def _end(engine: Engine, running: "asyncio.Task[None]") -> None:
    draining = asyncio.ensure_future(engine.drain())
    draining.add_done_callback(lambda _: running.cancel())


def _load_unet(card: ModelCard, adapter: Path | None, device: torch.device) -> torch.nn.Module:
    model = unet.load(card.folder)
    if adapter is not None:
        lora.put_adapter(model, adapter)
    placed: torch.nn.Module = model.eval().to(device)
    return placed


def _for_timing(card: ModelCard, device: torch.device, shape: LatentShape) -> Trajectory:
    return Trajectory(
        shape=shape,
        scheduler=card.default_scheduler,
        scheduler_config=card.scheduler_config,
        num_inference_steps=TIMED_STEPS,
        guidance=1.0,
        seed=0,
        condition=_any_condition(card),
        device=device,
    )


def _any_condition(card: ModelCard, tokens: int = 77) -> Conditioning:
    if card.condition == "none":
        return Conditioning()
    if card.condition == "classes":
        return Conditioning(class_labels=torch.tensor([0]))
    assert card.embedding_width is not None
    return Conditioning(embeddings=torch.zeros(1, tokens, card.embedding_width))
