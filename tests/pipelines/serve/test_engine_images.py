"""With a real U-Net and a real decoder."""

import asyncio
from functools import partial

import numpy as np
import pytest
import torch

from ldm import unet as unets
from ldm.autoencoder import load
from ldm.conditioning import ClassConditioner
from ldm.image_tensors import from_model
from ldm.objective import NoiseSchedule, Prediction
from ldm.sampling import SCHEDULERS, Trajectory, denoise_step
from pipelines.serve.engine import Engine
from pipelines.serve.step_costs import LatentShape, StepCosts, timed
from pipelines.serve.tickets import Work

# diffusers 0.42 converts its sigmas in a way that numpy 2 will stop to accept.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

SHAPE = (4, 8, 8)
CLASSES = ClassConditioner(["a", "b", "c"])
SAMPLERS = list(SCHEDULERS)


def _trajectory(scheduler: str, steps: int, guidance: float, seed: int) -> Trajectory:
    prediction: Prediction = "flow" if SCHEDULERS[scheduler].kind == "flow" else "v_prediction"
    return Trajectory(
        shape=SHAPE,
        scheduler=scheduler,
        scheduler_config=NoiseSchedule(prediction=prediction).scheduler_config(),
        num_inference_steps=steps,
        guidance=guidance,
        seed=seed,
        condition=CLASSES.encode([seed % 3]),
        null=CLASSES.null,
    )


def _for_timing(shape: LatentShape) -> Trajectory:
    return _trajectory(SAMPLERS[0], 50, 1.0, seed=0)


def test_every_scheduler_makes_the_same_image_alone_and_in_company() -> None:
    torch.manual_seed(0)
    unet = unets.build("tiny", in_channels=4, num_classes=3, sample_size=8).eval()
    asked = [(name, 3 + index, (1.0, 3.0)[index % 2], index) for index, name in enumerate(SAMPLERS * 2)]

    async def in_company() -> list[torch.Tensor]:
        step = partial(denoise_step, unet)
        engine = Engine(step, StepCosts(timed(step, _for_timing), max_rows=16))
        running = asyncio.create_task(engine.run())
        tickets = []
        for scheduler, steps, guidance, seed in asked:
            start = partial(_trajectory, scheduler, steps, guidance, seed)
            work = Work(start=start, shape=SHAPE, num_steps=steps, rows=1 if guidance == 1.0 else 2)
            tickets.append(await engine.submit(work))
            await asyncio.sleep(0.01)  # so that they come while others are on their way
        latents = await asyncio.gather(*(ticket.done for ticket in tickets))
        running.cancel()
        return list(latents)

    together = asyncio.run(in_company())
    decode = load("f8").decode
    for latent_CHW, (scheduler, steps, guidance, seed) in zip(together, asked, strict=True):
        trajectory = _trajectory(scheduler, steps, guidance, seed)
        while not trajectory.done:
            denoise_step(unet, [trajectory])
        alone, found = (
            from_model(decode(x_CHW[None]))[0].astype(int) for x_CHW in (trajectory.latent, latent_CHW)
        )
        assert np.abs(alone - found).max() <= 1
        assert (alone == found).mean() >= 0.999
