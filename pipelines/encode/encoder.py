"""The encoder stage: images of a unit → fp16 moments and their statistics, on one VAE per actor."""

import os
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ldm.autoencoder import Autoencoder, load
from ldm.errors import BadSampleError, UserError
from ldm.image_tensors import to_model
from ldm.latents import LatentStats, Moments
from pipelines.dataset import StoredStats
from pipelines.device import pick_device
from pipelines.encode.rows import DecodedUnit, EncodedUnit, EncoderTrace
from pipelines.latent_table import Rejected

__all__ = ["UnitEncoder", "encode_images", "encode_unit", "stored_moments"]

FP16_MAX = float(torch.finfo(torch.float16).max)

Latent = NDArray[np.float16]


class UnitEncoder:
    """The callable of the actor pool: loads the VAE once, then encodes one unit per call."""

    def __init__(self, vae: str, fingerprint: str, micro_batch: int, num_threads: int) -> None:
        # Fixed, because the number of threads can change the last bits of a convolution.
        torch.set_num_threads(num_threads)
        autoencoder = load(vae)
        # What lies under a path on this node need not be what the driver read there.
        if autoencoder.fingerprint != fingerprint:
            raise UserError(f"VAE {vae} on node {platform.node()} has other weights than on the driver")
        self.device = pick_device()
        self.autoencoder = autoencoder.to(self.device)
        self.micro_batch = micro_batch

    def __call__(self, table: pa.Table) -> pa.Table:
        """`DecodedUnit` row → `EncodedUnit` row."""
        start = time.perf_counter()
        encoded = encode_unit(self.autoencoder, DecodedUnit.from_table(table), self.micro_batch)
        seconds = time.perf_counter() - start
        trace = EncoderTrace(platform.node(), os.getpid(), str(self.device), seconds)
        return replace(encoded, trace=trace).to_table()


def encode_unit(autoencoder: Autoencoder, unit: DecodedUnit, micro_batch: int) -> EncodedUnit:
    """Encode a unit's images; a latent that fp16 cannot hold is rejected, the others are kept."""
    rejected = list(unit.rejected)
    kept: list[int] = []
    latents: list[tuple[Latent, Latent]] = []
    for index, (mean_Chw, std_Chw) in enumerate(encode_images(autoencoder, unit.images_N, micro_batch)):
        try:
            latents.append(stored_moments(mean_Chw, std_Chw))
            kept.append(index)
        except BadSampleError as error:
            source, position = unit.unit.shard.url, unit.positions[index]
            rejected.append(Rejected(unit.keys[index], source, position, error.reason, error.detail))
    return EncodedUnit(
        unit=unit.unit,
        num_inputs=unit.num_inputs,
        rejected=sorted(rejected, key=lambda r: r.position),
        keys=[unit.keys[index] for index in kept],
        labels=[unit.labels[index] for index in kept],
        stats=_stats(latents),
        trace=EncoderTrace(node="", pid=0, device=str(autoencoder.vae.device), seconds=0.0),
        means_N=[mean for mean, _ in latents],
        stds_N=[std for _, std in latents],
    )


def encode_images(
    autoencoder: Autoencoder, images_N: Sequence[NDArray[np.uint8]], micro_batch: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(mean, std) float32 (C, h, w) on the CPU per image, in order.

    images_N: uint8 (H, W, 3). Images of one size are encoded ``micro_batch`` at a time in their
    order, so that which images meet in a batch depends on the unit alone.
    """
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, image in enumerate(images_N):
        by_size[image.shape].append(index)
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for indices in by_size.values():
        for start in range(0, len(indices), micro_batch):
            batch = indices[start : start + micro_batch]
            moments = autoencoder.encode(to_model(np.stack([images_N[index] for index in batch])))
            pairs = zip(moments.mean_BChw.cpu(), moments.std_BChw.cpu(), strict=True)
            found.update(zip(batch, pairs, strict=True))
    return [found[index] for index in range(len(images_N))]


def stored_moments(mean_Chw: torch.Tensor, std_Chw: torch.Tensor) -> tuple[Latent, Latent]:
    """float32 moments → float16.

    BadSampleError ``non_finite_latent``, or ``latent_overflow`` where fp16 cannot hold a value.
    """
    largest = float(torch.maximum(mean_Chw.abs().max(), std_Chw.max()))
    if not np.isfinite(largest):
        raise BadSampleError("non_finite_latent")
    if largest > FP16_MAX:
        raise BadSampleError("latent_overflow", f"{largest:.3g}, fp16 holds up to {FP16_MAX:.0f}")
    return mean_Chw.half().numpy(), std_Chw.half().numpy()


def _stats(latents: Sequence[tuple[Latent, Latent]]) -> StoredStats | None:
    """Statistics of the values as stored, so that whoever reads the rows finds the same ones."""
    parts = [
        LatentStats.of(Moments(torch.from_numpy(mean)[None], torch.from_numpy(std)[None]))
        for mean, std in latents
    ]
    if not parts:
        return None
    merged = LatentStats.merge_all(parts)
    return StoredStats(count=merged.count, mean=merged.mean_C, m2=merged.m2_C)
