"""An upsampler stage: replicas that denoise large latents in windows (`ldm.cascade`)."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias, TypeVar

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ldm import autoencoder, unet
from ldm.cascade import Sampling, Upsampler, Upsampling, WindowDenoiser
from ldm.preview import LatentPreview
from pipelines.device import pick_device
from pipelines.serve.config import UpsamplerStage
from pipelines.serve.device_thread import device_thread
from pipelines.serve.messages import Progress, UpsampleRequest
from pipelines.serve.stage_metrics import StageMetrics
from pipelines.serve.tracing import current_span, describe
from pipelines.serve.work_left import WorkMeter

__all__ = ["UpsamplerReplica"]

Result = TypeVar("Result")
LatentRef: TypeAlias = "ray.ObjectRef[NDArray[np.float32]]"

# Until the first step was measured.
FIRST_GUESS_S_PER_LATENT = 1e-4
MAX_PREVIEW_PX = 512


class UpsamplerReplica:
    """Replica of stage ``number``, from 1 on. One latent after the other: its windows fill the batches."""

    def __init__(self, stage: UpsamplerStage, number: int, vae: str) -> None:
        if stage.threads:
            torch.set_num_threads(stage.threads)
        self.stage, self.number = stage, number
        self.upsampler = Upsampler.read(stage.checkpoint)
        model = unet.load(stage.checkpoint).to(pick_device())
        self.denoiser = WindowDenoiser(model, self.upsampler.info)
        self.vae = autoencoder.load(vae)
        self.thread = device_thread("upsampler")
        self.turn = asyncio.Lock()
        self.meter = WorkMeter(FIRST_GUESS_S_PER_LATENT)
        self.metrics = StageMetrics(f"upsampler {number}")

    async def upsample(
        self, request: UpsampleRequest, low_Chw: NDArray[np.float32]
    ) -> "AsyncIterator[Progress | LatentRef]":
        """Progress where it was asked for, and at the end a reference to the latent (C, H, W) float32.

        Whoever stops listening has cancelled, and no step is taken any more.
        """
        low, factor = torch.tensor(low_Chw), self.upsampler.factor
        units = low[0].numel() * factor**2 * self.stage.steps
        work, span, asked = self.meter.begin(units), current_span(), time.perf_counter()
        try:
            async with self.turn:
                describe(span, steps=self.stage.steps, queue_s=time.perf_counter() - asked)
                upsampling = Upsampling(low, self.upsampler, self._sampling(request), self.number)
                trajectory = upsampling.trajectory
                while not trajectory.done:
                    await self._step(upsampling, units)
                    left = trajectory.num_steps - trajectory.step_index
                    self.meter.progress(work, units * left / trajectory.num_steps)
                    if request.preview_every and trajectory.step_index % request.preview_every == 0:
                        yield await self._progress(upsampling, low)
                yield ray.put(upsampling.latent_CHW.numpy())
        finally:
            self.meter.end(work)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `pipelines.serve.work_left.WorkLeft`."""
        return self.meter.stats()

    async def _step(self, upsampling: Upsampling, units: float) -> None:
        started = time.perf_counter()
        await self._in_thread(lambda: upsampling.step(lambda batches: map(self.denoiser, batches)))
        seconds = time.perf_counter() - started
        self.meter.measured(units / upsampling.trajectory.num_steps, seconds)
        self.metrics.done(seconds)

    async def _progress(self, upsampling: Upsampling, low_Chw: torch.Tensor) -> Progress:
        trajectory = upsampling.trajectory

        def draw() -> NDArray[np.uint8]:
            # One pixel a latent would be a million of them at the end of a cascade.
            factor = max(1, -(-max(upsampling.size_HW) // MAX_PREVIEW_PX))
            small_CHW = F.avg_pool2d(upsampling.preview_CHW[None], factor, ceil_mode=True)[0]
            return LatentPreview.fit(self.vae, low_Chw)(small_CHW)

        return Progress(trajectory.step_index, trajectory.num_steps, await self._in_thread(draw))

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.thread, call)

    def _sampling(self, request: UpsampleRequest) -> Sampling:
        return Sampling(
            seed=request.seed,
            num_inference_steps=self.stage.steps,
            scheduler=self.upsampler.default_scheduler,
            noise_level=request.noise_level,
            window_overlap=self.stage.window_overlap,
            window_batch=self.stage.window_batch,
        )
