"""Generate images on Ray actors: requests → latents (sampler pool) → images (decoder pool).

The two stages are Ray Data actor pools, so the U-Net and the VAE scale and take devices apart.
"""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ldm import checkpoint, unet
from ldm.autoencoder import load
from ldm.conditioning import ClassConditioner, Conditioning
from ldm.errors import UserError
from ldm.image_tensors import from_model
from ldm.objective import kind_of
from ldm.sampling import MAX_SEED, Trajectory, sample
from ldm.schedulers import default_scheduler
from pipelines.device import pick_device
from pipelines.vae_source import on_every_node

__all__ = [
    "Decoder",
    "GeneratePools",
    "Generated",
    "Pool",
    "Request",
    "Sampler",
    "check",
    "generate",
    "labels_of",
    "scheduler_of",
]

Columns = dict[str, NDArray[Any]]


class Pool(BaseModel):
    """Actors of one stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: PositiveInt = 1
    batch_size: PositiveInt = 16
    num_cpus: PositiveFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
    threads: PositiveInt | None = Field(None, description="torch threads per actor; default: Ray's choice")

    @property
    def fixed_threads(self) -> int:
        """``threads``, else one for each CPU: their number changes the last bits of a sum."""
        return self.threads or max(1, math.floor(self.num_cpus))


class GeneratePools(BaseModel):
    """Actors of both stages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampler: Pool = Pool()
    decoder: Pool = Pool()


@dataclass(frozen=True)
class Request:
    """One image to make. label: class index, or None for no class; see `ldm.sampling.Trajectory`."""

    label: int | None
    seed: int
    guidance: float
    num_inference_steps: int
    scheduler: str


@dataclass(frozen=True)
class Generated:
    """Images (H, W, 3) uint8, and a line for every actor that took part: stage, process, node, device."""

    images: list[NDArray[np.uint8]]
    where: list[str]


class Sampler:
    """Actor: requests → whitened-back latents, in the VAE's own scale."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = pick_device()
        self.info = checkpoint.read_info(folder)
        self.scheduler_config = checkpoint.read_scheduler_config(folder)
        self.unet = unet.load(folder).eval().to(self.device)

    def __call__(self, batch: Columns) -> Columns:
        """Adds ``latent`` (B, C, h, w) float32 to a batch of requests."""
        trajectories = [
            self._trajectory({name: column[i] for name, column in batch.items()})
            for i in range(len(batch["seed"]))
        ]
        x_BChw = sample(self.unet, trajectories, batch_size=len(trajectories))
        latents = self.info.whitening.denormalise(x_BChw).cpu().numpy()
        return {**batch, "latent": latents, "sampler": np.full(len(latents), _place(self.device))}

    def _trajectory(self, row: dict[str, Any]) -> Trajectory:
        condition, null = Conditioning(), None
        guidance = float(row["guidance"])
        if self.info.class_names:
            conditioner = ClassConditioner(self.info.class_names)
            label = int(row["label"])
            condition, null = conditioner.encode([None if label < 0 else label]), conditioner.null
        return Trajectory(
            shape=self.info.latent_shape,
            scheduler=str(row["scheduler"]),
            scheduler_config=self.scheduler_config,
            num_inference_steps=int(row["num_inference_steps"]),
            guidance=guidance,
            seed=int(row["seed"]),
            condition=condition,
            null=null,
            device=self.device,
        )


class Decoder:
    """Actor: latents → uint8 images."""

    def __init__(self, vae: str, fingerprint: str, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.autoencoder = load(vae).to(pick_device())
        checkpoint.check_vae(self.autoencoder, fingerprint, "the checkpoint")

    def __call__(self, batch: Columns) -> Columns:
        """Replaces ``latent`` by ``image`` (B, H, W, 3) uint8."""
        images = from_model(self.autoencoder.decode(torch.from_numpy(np.stack(list(batch["latent"])))))
        kept = {name: column for name, column in batch.items() if name != "latent"}
        place = _place(self.autoencoder.vae.device)
        return {**kept, "image": images, "decoder": np.full(len(images), place)}


def _place(device: torch.device) -> str:
    return f"process {os.getpid()} on {platform.node()} ({device})"


def labels_of(info: checkpoint.CheckpointInfo, classes: Sequence[str]) -> list[int | None]:
    """Indices of ``classes``, names or indices, of all where there are none; [None] of a model without.

    UserError for a class that the model does not have.
    """
    if info.class_names:
        encoded = ClassConditioner(info.class_names).encode(classes or info.class_names).class_labels
        assert encoded is not None
        return list(encoded.tolist())
    if classes:
        raise UserError(f"class {classes[0]!r} for a model without classes", do="leave --classes out")
    return [None]


def scheduler_of(folder: Path, name: str) -> str:
    """``name``, or where it is empty what a checkpoint's kind is usually sampled with."""
    return name or default_scheduler(kind_of(checkpoint.read_scheduler_config(folder)))


def check(folder: Path, requests: Sequence[Request], vae: str | None) -> str:
    """Check everything before Ray is started; returns the VAE to decode with.

    UserError for a folder that is no checkpoint, an upsampler's, or one that takes texts; another VAE; a
    request that cannot be served.
    """
    info, scheduler_config = checkpoint.read_info(folder), checkpoint.read_scheduler_config(folder)
    if info.upsampling_factor is not None:
        raise UserError(
            f"{folder} is an upsampler, which cannot be sampled alone",
            do=f"enlarge something with it: ldm upscale INPUT OUT --stages {folder}",
        )
    if info.embedding_width is not None:
        raise UserError(
            f"{folder} is conditioned on text, not on classes",
            do=f"serve it: ldm serve {folder}",
        )
    unet.load(folder)
    chosen = vae or info.vae
    checkpoint.check_vae(load(chosen), info.vae_fingerprint, f"checkpoint {folder}")
    # Seeds are all alike but for those that are not allowed.
    kinds = {(r.scheduler, r.num_inference_steps, r.guidance, 0 <= r.seed <= MAX_SEED): r for r in requests}
    for request in kinds.values():
        one = (
            Conditioning(class_labels=torch.zeros(1, dtype=torch.int64))
            if info.class_names
            else Conditioning()
        )
        Trajectory(
            shape=(1, 1, 1),
            scheduler=request.scheduler,
            scheduler_config=scheduler_config,
            num_inference_steps=request.num_inference_steps,
            guidance=request.guidance,
            seed=request.seed,
            condition=one,
            null=one if info.class_names else None,
        )
    return chosen


def generate(folder: Path, requests: Sequence[Request], vae: str, pools: GeneratePools) -> Generated:
    """Images in the order of the requests. Needs a connected Ray; `check` first."""
    import ray
    from ray.data import ActorPoolStrategy

    info = checkpoint.read_info(folder)
    rows = [
        {**asdict(r), "label": -1 if r.label is None else r.label, "index": i} for i, r in enumerate(requests)
    ]
    sampler, decoder = pools.sampler, pools.decoder
    images = (
        ray.data.from_items(rows, override_num_blocks=-(-len(rows) // sampler.batch_size))
        .map_batches(
            Sampler,
            fn_constructor_args=(folder.absolute(), sampler.threads),
            batch_size=sampler.batch_size,
            num_cpus=sampler.num_cpus,
            num_gpus=sampler.num_gpus,
            compute=ActorPoolStrategy(size=sampler.size),
        )
        .map_batches(
            Decoder,
            fn_constructor_args=(on_every_node(vae), info.vae_fingerprint, decoder.threads),
            batch_size=decoder.batch_size,
            num_cpus=decoder.num_cpus,
            num_gpus=decoder.num_gpus,
            compute=ActorPoolStrategy(size=decoder.size),
        )
        .take_all()
    )
    images.sort(key=lambda row: int(row["index"]))
    where = sorted({f"{stage} {row[stage]}" for row in images for stage in ("sampler", "decoder")})
    return Generated([row["image"] for row in images], where)
