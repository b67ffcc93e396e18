"""The loss of one rank's share of a batch, and the conditions that its U-Net sees."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ldm import unet
from ldm.checkpoint import CheckpointInfo
from ldm.conditioning import ClassConditioner, Conditioning, EmbeddingConditioner, drop
from ldm.objective import diffusion_loss, min_snr_weight
from ldm.upsampling import enlarged, noise_levels, upsampler_input
from pipelines.train.config import UnetTraining
from pipelines.train.loader import LatentBatch
from pipelines.train.pairs import LowLatents

__all__ = ["conditioning_of", "loss_of"]


def loss_of(
    model: nn.Module, batch: LatentBatch, config: UnetTraining, info: CheckpointInfo, device: torch.device
) -> Tensor:
    """Loss of every row, float32 (B,) (Ho et al. 2020, algorithm 1)."""
    schedule = config.noise_schedule
    x0 = _clean(batch, info, device)
    noise, t_B = batch.noise_BChw.to(device), schedule.timesteps(batch.u_B).to(device)
    x_t, conditioning = schedule.add_noise(x0, noise, t_B), conditioning_of(batch, info).to(device)
    if batch.low is not None:
        x_t, conditioning = _with_low(x_t, conditioning, batch.low, info)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        prediction = unet.predict(model, x_t, t_B, conditioning)
    weight_B = min_snr_weight(schedule, t_B, config.min_snr_gamma) if config.min_snr_gamma else None
    return diffusion_loss(prediction, schedule.target(x0, noise, t_B), weight_B)


def _clean(batch: LatentBatch, info: CheckpointInfo, device: torch.device) -> Tensor:
    """What is diffused: the latents, or of an upsampler the residual."""
    z_BChw = batch.z_BChw.to(device)
    if batch.low is None:
        return info.whitening.normalise(z_BChw)
    residual = z_BChw - enlarged(batch.low.z_BChw.to(device), z_BChw.shape[2:])
    return info.residual_whitening.normalise(residual)


def _with_low(
    x_t: Tensor, conditioning: Conditioning, low: LowLatents, info: CheckpointInfo
) -> tuple[Tensor, Conditioning]:
    """What an upsampler's U-Net is given: `upsampler_input`, and its noise levels as class labels."""
    assert info.max_noise_level is not None
    level_B = noise_levels(low.u_B, info.max_noise_level).to(x_t.device)
    z_low = info.whitening.normalise(low.z_BChw.to(x_t.device))
    x_t = upsampler_input(x_t, z_low, low.noise_BChw.to(x_t.device), level_B)
    return x_t, replace(conditioning, class_labels=level_B)


def conditioning_of(batch: LatentBatch, info: CheckpointInfo) -> Conditioning:
    """Labels or embeddings of the batch; rows without one, or whose condition is dropped, get the null."""
    if info.embedding_width is not None:
        return _embeddings(batch, info.embedding_width)
    if not info.class_names:
        return Conditioning()
    # A row without a label trains the unconditional model.
    keep_B = batch.keep_B & (batch.labels_B >= 0)
    labels = Conditioning(class_labels=batch.labels_B.clamp(min=0))
    return drop(labels, keep_B, ClassConditioner(info.class_names).null)


def _embeddings(batch: LatentBatch, width: int) -> Conditioning:
    conditioner = EmbeddingConditioner(torch.zeros(1, width))
    null = np.zeros((1, width), np.float16)
    present: Sequence[Tensor] = [
        torch.from_numpy(null if embedding is None else embedding).float() for embedding in batch.embeddings_B
    ]
    return drop(conditioner.encode(present), batch.keep_B, conditioner.null)
