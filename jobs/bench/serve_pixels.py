"""Whether an image is the same in any company: beside one made alone, and beside diffusers' own loop."""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from jobs.bench.serve_engine import loaded_model
from jobs.bench.serve_model import NUM_CLASSES, bench_card, bench_request
from ldm import autoencoder, unet
from ldm.checkpoint import read_scheduler_config
from ldm.image_tensors import from_model
from ldm.model_card import ModelCard
from ldm.objective import Prediction
from ldm.sampling import denoise_step
from ldm.schedulers import SCHEDULERS
from pipelines.serve.loaded_model import trajectory
from pipelines.serve.messages import SampleRequest

__all__ = ["pixels"]

PREDICTIONS: tuple[Prediction, ...] = ("v_prediction", "flow")
STEPS, GUIDANCES = (3, 10, 25), (1.0, 3.0, 7.5)
# Between two requests, so that they come while others are on their way.
PAUSE_S = 0.02


def pixels(preset: str, side: int, seeds: int) -> dict[str, float]:
    """The least share of equal pixels, and the greatest difference in levels of 255, over all images.

    Every scheduler, steps and guidance of `STEPS` and `GUIDANCES`, in one engine at the same time.
    """
    alone, plain = list[NDArray[np.int16]](), list[NDArray[np.int16]]()
    for prediction in PREDICTIONS:
        with TemporaryDirectory() as folder:
            card = bench_card(Path(folder), preset, side, prediction)
            requests = list(_requests(card, prediction, seeds))
            random.Random(0).shuffle(requests)
            model = unet.load(card.folder).eval()
            found = asyncio.run(_in_company(card, requests))
            for x_Chw, request in zip(found, requests, strict=True):
                image = _image(card, x_Chw)
                alone.append(image - _image(card, _alone(card, model, request)))
                plain.append(image - _image(card, _of_diffusers(card, model, request)))
    everything = [*alone, *plain]
    return {
        "pixels_equal": min(float((difference == 0).mean()) for difference in everything),
        "pixels_equal_alone": min(float((difference == 0).mean()) for difference in alone),
        "pixels_equal_diffusers": min(float((difference == 0).mean()) for difference in plain),
        "pixels_most_levels": float(max(np.abs(difference).max() for difference in everything)),
        "pixels_images": float(len(alone)),
    }


def _requests(card: ModelCard, prediction: Prediction, seeds: int) -> Iterator[SampleRequest]:
    kind = "flow" if prediction == "flow" else "ddpm"
    for scheduler in (name for name, row in SCHEDULERS.items() if row.kind == kind):
        for steps in STEPS:
            for guidance in GUIDANCES:
                for seed in range(seeds):
                    request = bench_request(card, steps, seed)
                    yield replace(request, scheduler=scheduler, guidance=guidance)


async def _in_company(card: ModelCard, requests: list[SampleRequest]) -> list[Tensor]:
    async with loaded_model(card) as loaded:
        tickets = []
        for request in requests:
            tickets.append(await loaded.engine.submit(loaded.work(request, None)))
            await asyncio.sleep(PAUSE_S)
        return list(await asyncio.gather(*(ticket.done for ticket in tickets)))


def _alone(card: ModelCard, model: nn.Module, request: SampleRequest) -> Tensor:
    alone = trajectory(card, request)
    while not alone.done:
        denoise_step(model, [alone])
    return alone.latent


@torch.no_grad()
def _of_diffusers(card: ModelCard, model: nn.Module, request: SampleRequest) -> Tensor:
    """As a pipeline of diffusers does it: its scheduler, one batch of two, one image."""
    row = SCHEDULERS[request.scheduler]
    config = read_scheduler_config(card.folder)
    scheduler = getattr(diffusers, row.diffusers_class).from_config(config, **row.overrides)
    scheduler.set_timesteps(request.num_steps)
    generator = torch.Generator().manual_seed(request.seed)
    x_1Chw = torch.randn((1, *request.shape), generator=generator)
    if row.variance_exploding:
        x_1Chw = x_1Chw * scheduler.init_noise_sigma
    assert request.condition.label is not None
    labels = torch.tensor([request.condition.label, NUM_CLASSES])
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(x_1Chw, timestep) if row.variance_exploding else x_1Chw
        timesteps = timestep.float().repeat(2)
        yes, no = model(torch.cat([seen, seen]), timesteps, None, class_labels=labels).sample.chunk(2)
        guided = yes if request.guidance == 1.0 else no + request.guidance * (yes - no)
        x_1Chw = scheduler.step(guided, timestep, x_1Chw, generator=generator).prev_sample
    return x_1Chw[0]


def _image(card: ModelCard, x_Chw: Tensor) -> NDArray[np.int16]:
    latent_1Chw = card.whitening.denormalise(x_Chw[None])
    image_HW3: NDArray[np.int16] = from_model(autoencoder.load(card.vae).decode(latent_1Chw))[0].astype(
        np.int16
    )
    return image_HW3
