"""Train a VAE on image shards: Ray Data makes crops, Ray Train optimises, EMA weights are exported.

The loss is reconstruction (L1 or MSE per pixel value) + weight · KL, and where they are asked for a
perceptual distance and a PatchGAN, as in the latent diffusion paper (Rombach et al. 2022, appendix G).
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ldm import autoencoder
from ldm.discriminator import Discriminator
from ldm.ema import averaged, constant_decay
from ldm.errors import UserError
from ldm.image_tensors import to_model
from ldm.latents import LatentStats
from ldm.perceptual import SOURCES, load_perceptual
from ldm.vae_loss import VaeLoss
from pipelines.shards import list_shards
from pipelines.train.adversary import Adversary, Wrap
from pipelines.train.crops import CropConfig, crop_dataset, usable_images
from pipelines.train.progress import Progress, quiet_ray_train, stop_on_nan
from pipelines.train.schedule import lr_factor
from pipelines.train.trainer import run
from pipelines.train.vae_step import VaeOptimisation
from pipelines.vae_source import on_every_node

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from ray.train import Result

__all__ = ["VaeTraining", "check", "export", "fit", "num_crops", "set_scale", "trained_parts"]


# Batches after the last step from which the scaling factor is measured.
STATISTICS_BATCHES = 64


class VaeTraining(CropConfig):
    """How to train a VAE, on which crops."""

    preset: str = Field("f8", description=f"layout to start from: {', '.join(autoencoder.PRESETS)}")
    init: str | None = Field(None, description="VAE to start from instead: a default, folder, URL or hub id")
    parts: Literal["all", "decoder"] = Field(
        "all", description="decoder: encoder and latents stay as they are; needs init"
    )
    steps: PositiveInt = 1000
    batch_size: PositiveInt = Field(8, description="crops per step over all workers")
    loss: Literal["l1", "mse"] = "mse"
    kl_weight: NonNegativeFloat = Field(1e-3, description="of the KL per pixel value, in nats")
    perceptual: str | None = Field(
        None,
        description=f"adds a perceptual distance: {', '.join(SOURCES)}, or a folder with torchvision's file",
    )
    perceptual_weight: PositiveFloat = Field(0.1, description="of that distance")
    gan_weight: NonNegativeFloat = Field(
        0.0, description="of a PatchGAN's term, beside its adaptive weight; 0: no discriminator"
    )
    gan_start_step: PositiveInt = Field(1, description="the discriminator is at rest before this step")
    learning_rate: PositiveFloat = 1.5e-4
    discriminator_lr: PositiveFloat = Field(1.5e-4, description="constant, without warm-up")
    warmup_steps: PositiveInt = 100
    ema_decay: float = Field(0.999, ge=0, lt=1)
    clip_norm: PositiveFloat = 1.0
    log_every: PositiveInt = 100
    checkpoint_every: PositiveInt = 2000
    num_workers: PositiveInt = 1
    num_gpus: float = Field(0.0, ge=0, description="per worker")
    threads: PositiveInt | None = Field(None, description="torch threads per worker; default: Ray's choice")
    dtype: Literal["fp32", "fp16"] = Field("fp32", description="of the exported weights")


def num_crops(config: VaeTraining) -> int:
    """Crops for all steps and, where the latents change, for the statistics after them."""
    statistics = STATISTICS_BATCHES if config.parts == "all" else 0
    return (config.steps + statistics) * config.batch_size


def check(source: str, config: VaeTraining) -> None:
    """UserError where input, start, crop size or perceptual weights cannot be used; before Ray is started."""
    if not any(True for shard in list_shards(source) for _ in usable_images(shard)):
        raise UserError(f"no usable image in {source}", do="check the shards, or run ldm shards")
    if config.batch_size % config.num_workers:
        raise UserError(
            f"a batch of {config.batch_size} cannot be shared by {config.num_workers} workers evenly"
        )
    if config.parts == "decoder" and not config.init:
        raise UserError("no VAE whose decoder is to be trained", do="give it as init, or train all parts")
    start = (
        autoencoder.load(config.init)
        if config.init
        else autoencoder.Autoencoder(autoencoder.build(config.preset))
    )
    start.check_size(config.crop_px, config.crop_px)
    if type(start.vae).__name__ != "AutoencoderKL":
        raise UserError(f"cannot train a {type(start.vae).__name__}", allowed="AutoencoderKL")
    if config.gan_weight:
        Discriminator.check_size(config.crop_px, config.crop_px)
    if config.perceptual:
        load_perceptual(config.perceptual).check_size(config.crop_px, config.crop_px)


def export(trained: Path, out: Path, dtype: str) -> None:
    """Write a trained VAE folder to ``out`` with the weights in ``dtype`` (fp32 or fp16)."""
    vae = autoencoder.load(trained).vae
    # diffusers notes where a model was loaded from: this machine's path has no place in an export.
    vae.register_to_config(_name_or_path="")
    # Not vae.to: diffusers warns of every cast, whether or not the model minds it.
    nn.Module.to(vae, torch.float16 if dtype == "fp16" else torch.float32).save_pretrained(out)


def fit(source: str, config: VaeTraining, storage: Path) -> "Result":
    """Train on Ray; the result's checkpoint holds ``vae/`` (EMA weights, diffusers format).

    Its metrics are means since the last report, and where there is a perceptual term also the name
    and the fingerprint of the extractor (`ldm.perceptual.Perceptual`).
    """
    places = {
        "init": on_every_node(config.init) if config.init else None,
        "perceptual": on_every_node(config.perceptual) if config.perceptual else None,
    }
    return run(
        _train_worker,
        {"config": config.model_copy(update=places)},
        num_workers=config.num_workers,
        num_gpus=config.num_gpus,
        storage=storage,
        datasets={"train": crop_dataset(source, config, num_crops(config))},
    )


def trained_parts(vae: "AutoencoderKL", parts: str) -> "AutoencoderKL":
    """In training mode, with gradients for "all" or for the "decoder", behind the latent, alone."""
    vae = vae.train().requires_grad_(True)
    if parts == "decoder":
        for frozen in (vae.encoder, vae.quant_conv):
            if frozen is not None:  # a VAE may have no quant_conv
                frozen.requires_grad_(False)
    return vae


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
    vae = trained_parts(vae, config.parts).to(memory_format=torch.channels_last)
    ema = averaged(vae, constant_decay(config.ema_decay)).to(get_device())
    optimisation = _optimisation(vae, config, prepare_model)
    extractor = _extractor(optimisation.loss)
    torch.manual_seed(config.seed + 1 + rank)  # the posterior's noise differs between workers
    stream = ray.train.get_dataset_shard("train").iter_batches(
        batch_size=config.batch_size // world,
        batch_format="numpy",
        local_shuffle_buffer_size=64 * config.batch_size,
        local_shuffle_seed=config.seed + rank,
        drop_last=True,
    )
    batches = (to_model(batch["image"]) for batch in stream)
    sums: Tensor | float = 0.0
    progress = Progress("train-vae", config.steps, config.batch_size, quiet=rank > 0)
    for step, images in zip(range(1, config.steps + 1), batches, strict=False):
        terms, norm = optimisation.step(step, images.to(get_device()))
        ema.update_parameters(vae)
        sums = sums + torch.stack(list(terms.values()))
        last = step == config.steps
        if last or step % config.log_every == 0:
            means = (sums / (step % config.log_every or config.log_every)).tolist()
            metrics = {"step": step, **dict(zip(terms, means, strict=True))}
            sums = 0.0
            stop_on_nan(metrics | {"gradient norm": float(norm)})
            progress.line(step, metrics)
            if last or step % config.checkpoint_every == 0:
                if config.parts == "all":
                    set_scale(ema.module, islice(batches, STATISTICS_BATCHES) if last else [images])
                _report_checkpoint(metrics | extractor, ema.module, rank)
            else:
                ray.train.report(metrics | extractor)


def _optimisation(vae: "AutoencoderKL", config: VaeTraining, wrap: Wrap) -> VaeOptimisation:
    perceptual = load_perceptual(config.perceptual) if config.perceptual else None
    adversary = None
    if config.gan_weight:
        adversary = Adversary(
            Discriminator(),
            wrap,
            weight=config.gan_weight,
            learning_rate=config.discriminator_lr,
            start_step=config.gan_start_step,
        )
    return VaeOptimisation(
        VaeLoss(vae, config.loss, config.kl_weight, perceptual, config.perceptual_weight),
        wrap,
        learning_rate=config.learning_rate,
        lr_factor=lambda step: lr_factor(step, config.steps, config.warmup_steps),
        clip_norm=config.clip_norm,
        adversary=adversary,
    )


def _extractor(loss: VaeLoss) -> dict[str, str]:
    if loss.perceptual is None:
        return {}
    return {
        "perceptual_extractor": loss.perceptual.name,
        "perceptual_fingerprint": loss.perceptual.fingerprint,
    }


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


def _report_checkpoint(metrics: dict[str, Any], vae: "AutoencoderKL", rank: int) -> None:
    """Report ``metrics`` with a checkpoint, of which rank 0 writes the one part: ``vae/``."""
    import ray.train

    with TemporaryDirectory() as folder:
        if rank == 0:
            vae.save_pretrained(Path(folder) / "vae")
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint if rank == 0 else None)
