"""fp32 beside narrower numbers: bytes of weights, peak memory, speed in turns, and what is lost.

Of a VAE's decoder on photographs, and of a checkpoint's U-Net on its samples.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from jobs.bench.bursts import median_seconds
from jobs.bench.peak_rss import PeakRss
from ldm import checkpoint, unet
from ldm.autoencoder import load
from ldm.conditioning import ClassConditioner, Conditioning
from ldm.distribution import frechet_distance_of_rows
from ldm.errors import UserError
from ldm.features import Extractor
from ldm.half_decoder import HalfDecoder
from ldm.image_tensors import to_model
from ldm.meta_cost import weight_bytes
from ldm.metrics import psnr
from ldm.objective import kind_of
from ldm.quantise import QUANTISATIONS, linear_share, quantise, require_torchao
from ldm.sampling import Trajectory, sample
from ldm.schedulers import default_scheduler

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Reduced", "check_checkpoint", "decoder_rows", "unet_rows"]

EXACT = "float32"
HALVES: Mapping[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
BATCH = 8


@dataclass(frozen=True)
class Reduced:
    """One network in one form. seconds: of a call; speed: those of fp32 ÷ these.

    peak_bytes: what a call takes beside the weights. psnr_db: of its pictures against those of fp32, inf
    where they are equal. fd: Fréchet distance of the features of the two sets. num_repeated: decodes that
    overflowed and were repeated in fp32, None where there is no guard.
    """

    network: str
    form: str
    weight_bytes: int
    peak_bytes: int
    seconds: float
    speed: float
    psnr_db: float
    fd: float
    num_repeated: int | None


@dataclass(frozen=True)
class _Form:
    """A network, the call of it that is timed, and the pictures that it makes, (B, 3, H, W) in [-1, 1]."""

    network: nn.Module
    call: Callable[[], object]
    pictures: Callable[[], Tensor]
    guard: HalfDecoder | None = None


def decoder_rows(
    vae: str, pixels_BHW3: "NDArray[np.uint8]", extractor: Extractor, seconds: float
) -> list[Reduced]:
    """The VAE's decoder in fp32 and in half precision, on photographs, one at a time."""
    exact = load(vae)
    latents = exact.encode(to_model(pixels_BHW3)).mode()

    def form(decode: Callable[[Tensor], Tensor], network: nn.Module, guard: HalfDecoder | None) -> _Form:
        return _Form(
            network,
            lambda: decode(latents[:1]),
            lambda: torch.cat([decode(latent[None]) for latent in latents]),
            guard,
        )

    forms = {EXACT: form(exact.decode, exact.vae, None)}
    for name, dtype in HALVES.items():
        guard = HalfDecoder(load(vae), dtype)
        forms[name] = form(guard.decode, guard.autoencoder.vae, guard)
    return _compared(f"VAE {vae}, decode of {len(latents)} photographs", forms, extractor, seconds)


def check_checkpoint(folder: Path) -> None:
    """UserError unless it can be sampled by class or without a condition, and quantised here."""
    info = checkpoint.read_info(folder)
    if info.upsampling_factor is not None or info.embedding_width is not None:
        kind = "an upsampler" if info.upsampling_factor is not None else "conditioned on embeddings"
        raise UserError(f"{folder} is {kind}", allowed="a checkpoint with classes, or without conditions")
    checkpoint.read_scheduler_config(folder)
    unet.load(folder)
    checkpoint.check_vae(load(info.vae), info.vae_fingerprint, f"checkpoint {folder}")
    require_torchao()


def unet_rows(
    folder: Path, num_images: int, steps: int, extractor: Extractor, seconds: float
) -> list[Reduced]:
    """The checkpoint's U-Net in fp32 and int8: a call for `BATCH` images, and samples of the same seeds."""
    info = checkpoint.read_info(folder)
    vae = load(info.vae)
    exact = unet.load(folder).eval().requires_grad_(False)

    def form(network: nn.Module) -> _Form:
        return _Form(
            network,
            lambda: _predict(network, info),
            lambda: vae.decode(_latents(network, folder, num_images, steps)),
        )

    forms = {EXACT: form(exact)}
    for name in QUANTISATIONS:
        network = copy.deepcopy(exact)
        quantise(network, name)
        forms[name] = form(network)
    title = f"U-Net, {num_images} samples of {steps} steps, {linear_share(exact):.0%} of it linear"
    return _compared(title, forms, extractor, seconds)


@torch.no_grad()
def _predict(network: nn.Module, info: checkpoint.CheckpointInfo) -> Tensor:
    labels = torch.zeros(BATCH, dtype=torch.int64) if info.class_names else None
    t_B = torch.full((BATCH,), 500.0)
    return unet.predict(network, torch.zeros(BATCH, *info.latent_shape), t_B, Conditioning(labels))


def _latents(network: nn.Module, folder: Path, num_images: int, steps: int) -> Tensor:
    """Samples of seeds 0, 1, … without guidance, classes in turn; in the VAE's own scale."""
    info, config = checkpoint.read_info(folder), checkpoint.read_scheduler_config(folder)

    def condition(index: int) -> Conditioning:
        if not info.class_names:
            return Conditioning()
        return ClassConditioner(info.class_names).encode([index % len(info.class_names)])

    trajectories = [
        Trajectory(
            shape=info.latent_shape,
            scheduler=default_scheduler(kind_of(config)),
            scheduler_config=config,
            num_inference_steps=steps,
            guidance=1.0,
            seed=index,
            condition=condition(index),
        )
        for index in range(num_images)
    ]
    return info.whitening.denormalise(sample(network, trajectories, BATCH))


def _compared(
    network: str, forms: Mapping[str, _Form], extractor: Extractor, seconds: float
) -> list[Reduced]:
    durations = median_seconds({name: form.call for name, form in forms.items()}, seconds)
    pictures = {name: form.pictures() for name, form in forms.items()}
    exact, features = _zero_to_one(pictures[EXACT]), extractor(pictures[EXACT]).numpy()
    rows = []
    for name, form in forms.items():
        peak = PeakRss()
        form.call()
        rows.append(
            Reduced(
                network=network,
                form=name,
                weight_bytes=weight_bytes(form.network),
                peak_bytes=peak.growth_bytes(),
                seconds=durations[name],
                speed=durations[EXACT] / durations[name],
                psnr_db=float(psnr(exact, _zero_to_one(pictures[name])).mean()),
                fd=frechet_distance_of_rows(features, extractor(pictures[name]).numpy()),
                num_repeated=form.guard.num_repeated if form.guard else None,
            )
        )
    return rows


def _zero_to_one(images_B3HW: Tensor) -> Tensor:
    return images_B3HW.add(1).div(2)
