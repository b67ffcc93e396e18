"""Images of a unit → latents as stored, and their statistics."""

import os
import platform
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.errors import BadSampleError
from ldm.latents import LatentStats, Moments, keyed_normal
from ldm.seeds import keyed_seed
from pipelines.dataset_records import StoredStats
from pipelines.encode.attempts import Attempt
from pipelines.encode.micro_batches import ImageEncoder
from pipelines.encode.rows import DecodedUnit, EncodedUnit, EncoderTrace
from pipelines.latent_table import Rejected
from pipelines.storage_form import StorageForm, dequantise, quantise

__all__ = ["encode_unit", "stored_moments"]

FP16_MAX = float(torch.finfo(torch.float16).max)

Latent = NDArray[np.float16]


def encode_unit(
    encoder: ImageEncoder, unit: DecodedUnit, form: StorageForm, this_attempt: Attempt
) -> EncodedUnit:
    """Encode a unit's images; a sample of which a view cannot be stored is rejected, others are kept."""
    started_at, start = time.time(), time.perf_counter()
    keys, num_samples = unit.samples.keys, len(unit.samples)
    views = len(unit.images_N) // max(num_samples, 1)
    sides = [unit.images_N]
    if form.mirrored:
        sides.append([image[:, ::-1] for image in unit.images_N])
    found = [encoder.encode(images, this_attempt) for images in sides]
    kept: list[int] = []
    rejected = list(unit.rejected)
    latents: list[list[tuple[Latent, Latent]]] = [[] for _ in sides]
    for index, key in enumerate(keys):
        mine = range(index * views, (index + 1) * views)
        try:
            stored = [[stored_moments(side[i], form, key, s) for i in mine] for s, side in enumerate(found)]
        except BadSampleError as error:
            source, position = unit.unit.shard.url, unit.samples.positions[index]
            rejected.append(Rejected(key, source, position, error.reason, error.detail))
            continue
        kept.append(index)
        for kept_pairs, pairs in zip(latents, stored, strict=True):
            kept_pairs.extend(pairs)
    mirrored = latents[1] if form.mirrored else []
    return EncodedUnit(
        unit=unit.unit,
        num_inputs=unit.num_inputs,
        rejected=sorted(rejected, key=lambda r: r.position),
        samples=unit.samples.take(kept),
        stats=_stats(latents[0]),
        decode_s=unit.decode_s,
        trace=EncoderTrace(
            node=platform.node(),
            pid=os.getpid(),
            device=str(encoder.device),
            started_at=started_at,
            seconds=time.perf_counter() - start,
        ),
        means_N=[mean for mean, _ in latents[0]],
        stds_N=[std for _, std in latents[0]],
        mirrored_means_N=[mean for mean, _ in mirrored],
        mirrored_stds_N=[std for _, std in mirrored],
        texts=unit.texts,
        embeddings_T=unit.embeddings_T,
    )


def stored_moments(
    moments: tuple[torch.Tensor, torch.Tensor] | BadSampleError, form: StorageForm, key: str, side: int
) -> tuple[Latent, Latent]:
    """(mean, std) float32 (C, h, w) → float16 (C, h, w), just as a reader of the stored form gets them.

    std is 0 where the form has none. ``side``: 1 for the mirrored image. BadSampleError: the one
    given, ``non_finite_latent``, or ``latent_overflow`` where fp16 cannot hold a value.
    """
    if isinstance(moments, BadSampleError):
        raise moments
    mean_Chw, std_Chw = moments
    largest = float(torch.maximum(mean_Chw.abs().max(), std_Chw.max()))
    if not np.isfinite(largest):
        raise BadSampleError("non_finite_latent")
    if form.stored == "sample":
        noise = keyed_normal([keyed_seed("stored sample", form.seed, key, side)], mean_Chw.shape)
        mean_Chw = mean_Chw + std_Chw * noise[0]
        largest = float(mean_Chw.abs().max())
    if largest > FP16_MAX:
        raise BadSampleError("latent_overflow", f"{largest:.3g}, fp16 holds up to {FP16_MAX:.0f}")
    std_Chw = std_Chw if form.stored == "moments" else torch.zeros_like(std_Chw)
    return _as_read(mean_Chw, form), _as_read(std_Chw, form)


def _as_read(latent_Chw: torch.Tensor, form: StorageForm) -> Latent:
    latent: Latent = latent_Chw.half().numpy()
    return dequantise(quantise(latent[None]))[0] if form.dtype == "int8" else latent


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
