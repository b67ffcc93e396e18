"""Train a VAE on image shards: Ray Data makes crops, Ray Train optimises, EMA weights are exported.

The loss is reconstruction (L1 or MSE per pixel value) + weight · KL, as in the latent diffusion
paper (Rombach et al. 2022, appendix G) without its perceptual and adversarial terms.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ldm import autoencoder
from ldm.ema import averaged
from ldm.errors import BadSampleError, UserError
from ldm.images import decode_image, to_model
from ldm.latents import LatentStats, keyed_seed
from pipelines.shards import Shard, list_shards, read_samples
from pipelines.train.progress import Progress, quiet_ray_train, stop_on_nan
from pipelines.train.schedule import lr_factor
from pipelines.vae_source import on_every_node

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from ray.data import Dataset
    from ray.train import Result

__all__ = ["VaeLoss", "VaeTraining", "crop_dataset", "fit"]


# Batches after the last step from which the scaling factor is measured.
STATISTICS_BATCHES = 64


class VaeTraining(BaseModel):
    """How to train a VAE. One pass over the input makes ``crops_per_megapixel`` crops of each image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = Field("f8", description=f"layout to start from: {', '.join(autoencoder.PRESETS)}")
    init: str | None = Field(None, description="VAE to start from instead: a default, folder, URL or hub id")
    steps: PositiveInt = 1000
    batch_size: PositiveInt = Field(8, description="crops per step over all workers")
    crop_px: PositiveInt = 64
    zoom_max: PositiveFloat = Field(
        2.0, ge=1, description="a crop shows 1 to this many times crop_px, reduced"
    )
    crops_per_megapixel: PositiveFloat = 30.0
    loss: Literal["l1", "mse"] = "mse"
    kl_weight: NonNegativeFloat = Field(1e-3, description="of the KL per pixel value, in nats")
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: PositiveInt = 100
    ema_decay: float = Field(0.999, ge=0, lt=1)
    clip_norm: PositiveFloat = 1.0
    seed: int = 0
    log_every: PositiveInt = 100
    checkpoint_every: PositiveInt = 2000
    num_workers: PositiveInt = 1
    num_gpus: float = Field(0.0, ge=0, description="per worker")
    threads: PositiveInt | None = Field(None, description="torch threads per worker; default: Ray's choice")
    dtype: Literal["fp32", "fp16"] = Field("fp32", description="of the exported weights")


class VaeLoss(nn.Module):
    """Reconstruction + KL loss of a VAE as one module, so that its forward pass goes through DDP."""

    def __init__(self, vae: "AutoencoderKL", loss: str, kl_weight: float) -> None:
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight
        self.distance = nn.functional.l1_loss if loss == "l1" else nn.functional.mse_loss

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, reconstruction, kl), scalars; images in [-1, 1].

        ``kl`` is KL(q(z|x) ‖ N(0, 1)) in nats per pixel value.
        """
        posterior = self.vae.encode(images_B3HW).latent_dist
        reconstruction = self.distance(self.vae.decode(posterior.sample()).sample, images_B3HW)
        kl = posterior.kl().mean() / images_B3HW[0].numel()
        return reconstruction + self.kl_weight * kl, reconstruction, kl


def crops(shard: Shard, pass_index: int, config: VaeTraining) -> Iterator[dict[str, Any]]:
    """Random crops (crop_px, crop_px, 3) uint8 of every image of a shard, seeded by (seed, pass, key)."""
    for key, image in _images(shard):
        rng = np.random.default_rng(keyed_seed(config.seed, pass_index, shard.name, key))
        # The fraction is kept in expectation: a small picture gives a crop in some passes only.
        for _ in range(int(_crops_expected(image, config) + rng.random())):
            side = min(config.crop_px * rng.uniform(1.0, config.zoom_max), *image.size)
            left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
            crop = image.resize((config.crop_px,) * 2, 1, box=(left, top, left + side, top + side))
            pixels = np.asarray(crop)
            yield {"image": np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)}


def _images(shard: Shard) -> Iterator[tuple[str, Image.Image]]:
    """(key, image) of every sample that can be used; `ldm encode` is where none may be lost."""
    with suppress(BadSampleError):  # a torn archive: what lies before the damage is learned from
        for sample in read_samples(shard):
            with suppress(BadSampleError):
                yield sample.key, decode_image(sample.image or b"")


def _crops_expected(image: Image.Image, config: VaeTraining) -> float:
    return image.width * image.height / 1e6 * config.crops_per_megapixel


def num_passes(crops_per_pass: float, config: VaeTraining) -> int:
    """Passes that yield enough crops for all steps and for the statistics after them.

    Enough also where a picture gives a crop in some passes only: such counts spread no more than
    a Poisson variable's, of which four standard deviations are added.
    """
    needed = (config.steps + STATISTICS_BATCHES) * config.batch_size
    return math.ceil((needed + 4 * math.sqrt(needed) + 16) / crops_per_pass)


def crop_dataset(source: str, config: VaeTraining) -> "Dataset":
    """A stream of at least steps · batch_size shuffled crops, as a lazy Ray Dataset (column ``image``)."""
    import ray

    shards = list_shards(source)
    per_pass = sum(_crops_expected(image, config) for shard in shards for _, image in _images(shard))
    rng = np.random.default_rng(config.seed)
    items = [
        {"shard": shards[i], "pass_index": p}
        for p in range(num_passes(per_pass, config))
        for i in rng.permutation(len(shards))
    ]
    return ray.data.from_items(items, override_num_blocks=len(items)).flat_map(
        lambda item: crops(item["shard"], item["pass_index"], config)
    )


def check(source: str, config: VaeTraining) -> None:
    """UserError where the input, the start or the crop size cannot be used; before Ray is started."""
    if not any(True for shard in list_shards(source) for _ in _images(shard)):
        raise UserError(f"no usable image in {source}", do="check the shards, or run ldm shards")
    if config.batch_size % config.num_workers:
        raise UserError(
            f"a batch of {config.batch_size} cannot be shared by {config.num_workers} workers evenly"
        )
    start = (
        autoencoder.load(config.init)
        if config.init
        else autoencoder.Autoencoder(autoencoder.build(config.preset))
    )
    start.check_size(config.crop_px, config.crop_px)
    if type(start.vae).__name__ != "AutoencoderKL":
        raise UserError(f"cannot train a {type(start.vae).__name__}", allowed="AutoencoderKL")


def export(trained: Path, out: Path, dtype: str) -> None:
    """Write a trained VAE folder to ``out`` with the weights in ``dtype`` (fp32 or fp16)."""
    vae = autoencoder.load(trained).vae
    # diffusers notes where a model was loaded from: this machine's path has no place in an export.
    vae.register_to_config(_name_or_path="")
    # Not vae.to: diffusers warns of every cast, whether or not the model minds it.
    nn.Module.to(vae, torch.float16 if dtype == "fp16" else torch.float32).save_pretrained(out)


def fit(source: str, config: VaeTraining, storage: Path) -> "Result":
    """Train on Ray; the result's checkpoint holds ``vae/`` (EMA weights, diffusers format)."""
    from ray.train import CheckpointConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    init = on_every_node(config.init) if config.init else None
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"config": config.model_copy(update={"init": init})},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.num_gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": config.num_gpus} if config.num_gpus else {})},
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # v2 of Ray Train, which mypy takes for v1
            name="ray_train",
            storage_path=str(storage.absolute()),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        datasets={"train": crop_dataset(source, config)},
    )
    return trainer.fit()


def _train_worker(loop: dict[str, VaeTraining]) -> None:
    import ray.train
    from ray.train.torch import get_device, prepare_model

    config = loop["config"]
    quiet_ray_train()
    if config.threads:
        torch.set_num_threads(config.threads)
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.manual_seed(config.seed)
    vae = autoencoder.load(config.init).vae if config.init else autoencoder.build(config.preset)
    vae = vae.train().requires_grad_(True).to(memory_format=torch.channels_last)
    ema = averaged(vae, config.ema_decay).to(get_device())
    torch.manual_seed(config.seed + 1 + rank)  # the posterior's noise differs between workers
    module = VaeLoss(vae, config.loss, config.kl_weight)
    model = prepare_model(module)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, config.steps, config.warmup_steps)
    )
    stream = ray.train.get_dataset_shard("train").iter_batches(
        batch_size=config.batch_size // world,
        batch_format="numpy",
        local_shuffle_buffer_size=64 * config.batch_size,
        local_shuffle_seed=config.seed + rank,
        drop_last=True,
    )
    batches = (to_model(batch["image"]) for batch in stream)
    sums = torch.zeros(3, device=get_device())
    progress = Progress("train-vae", config.steps, config.batch_size, quiet=rank > 0)
    for step, images in zip(range(1, config.steps + 1), batches, strict=False):
        loss, reconstruction, kl = model(images.to(get_device()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()
        ema.update_parameters(vae)
        sums += torch.stack([loss, reconstruction, kl]).detach()
        last = step == config.steps
        if last or step % config.log_every == 0:
            means = (sums / (step % config.log_every or config.log_every)).tolist()
            metrics = {"step": step, **dict(zip(("loss", "reconstruction", "kl"), means, strict=True))}
            sums.zero_()
            stop_on_nan(metrics | {"gradient norm": float(norm)})
            progress.line(step, metrics)
            if last or step % config.checkpoint_every == 0:
                set_scale(ema.module, islice(batches, STATISTICS_BATCHES) if last else [images])
                _report_checkpoint(metrics, ema.module, rank)
            else:
                ray.train.report(metrics)


def set_scale(vae: "AutoencoderKL", batches: Iterable[Tensor]) -> None:
    """Record the scale of the latents of ``batches`` in the VAE's config: measured, not a constant.

    ``scaling_factor`` alone gives std 1 over all channels; with ``latents_mean`` and ``latents_std``,
    as diffusers combines the three, every channel has mean 0 and std 1.
    """
    encoder = autoencoder.Autoencoder(vae)
    stats = LatentStats.merge_all(LatentStats.of(encoder.encode(images)) for images in batches)
    factor = stats.scaling_factor
    vae.register_to_config(
        scaling_factor=round(factor, 5),
        latents_mean=[round(mean, 5) for mean in stats.mean_C],
        latents_std=[round(std * factor, 5) for std in stats.std_C],
    )


def _report_checkpoint(metrics: dict[str, float], vae: "AutoencoderKL", rank: int) -> None:
    """Report ``metrics`` with a checkpoint, of which rank 0 writes the one part: ``vae/``."""
    import ray.train

    with TemporaryDirectory() as folder:
        if rank == 0:
            vae.save_pretrained(Path(folder) / "vae")
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint if rank == 0 else None)
