"""What reusing deep features saves, and what it costs in quality."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from jobs.bench.rounds import median_seconds
from jobs.bench.serve_model import bench_card, bench_request
from ldm import autoencoder, unet
from ldm.model_card import ModelCard, read_card
from ldm.sampling import sample
from pipelines.serve.loaded_model import trajectory

__all__ = ["loss_db", "speed"]

EVERY, STEPS, IMAGES = 2, 50, 8


def speed(preset: str, side: int, rounds: int) -> dict[str, float]:
    """Images a second with the deep part at every second step over those without, in batches of 8."""
    with TemporaryDirectory() as folder:
        card = bench_card(Path(folder), preset, side)
        model = unet.load(card.folder).eval()
        ways: dict[str, Callable[[], object]] = {
            name: lambda every=every: _latents(card, model, every)  # type: ignore[misc]
            for name, every in (("without", 1), ("with", EVERY))
        }
        seconds = median_seconds(ways, rounds)
    return {"reuse_gain": seconds["without"] / seconds["with"]}


def loss_db(folder: Path) -> dict[str, float]:
    """PSNR of images against those without reuse: the least and the mean of 8."""
    card = read_card(folder)
    model = unet.load(card.folder).eval()
    decode = autoencoder.load(card.vae).decode
    images = [decode(card.whitening.denormalise(_latents(card, model, every))) for every in (1, EVERY)]
    errors = ((images[0] - images[1]) / 2).square().mean(dim=(1, 2, 3))
    psnr_db = -10 * torch.log10(errors)
    return {"reuse_psnr_db": float(psnr_db.min()), "reuse_psnr_mean_db": float(psnr_db.mean())}


def _latents(card: ModelCard, model: nn.Module, every: int) -> Tensor:
    """One image for each of `IMAGES` seeds, staggered as requests are that come one after the other."""
    requests = [replace(bench_request(card, STEPS, seed), refresh_every=every) for seed in range(IMAGES)]
    return sample(model, [trajectory(card, request) for request in requests], batch_size=IMAGES)
