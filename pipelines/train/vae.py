"""Train a VAE on image shards: Ray Data makes crops, Ray Train optimises, EMA weights are exported.

The loss is reconstruction (L1 or MSE per pixel value) + weight · KL, and where they are asked for a
perceptual distance and a PatchGAN, as in the latent diffusion paper (Rombach et al. 2022, appendix G).
A run that was stopped goes on from its newest snapshot, with the crops and the noise that were next.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm import autoencoder
from ldm.discriminator import Discriminator
from ldm.ema import averaged, constant_decay
from ldm.errors import UserError
from ldm.latents import LatentStats
from ldm.perceptual import load_perceptual
from pipelines.shards import list_shards
from pipelines.shards.shard import version_of_all
from pipelines.train.crop_order import WINDOW_BATCHES, CropOrder, crop_dataset, shuffled_batches
from pipelines.train.crops import usable_images
from pipelines.train.metrics_log import METRICS_FILE, MetricsLog, Timed
from pipelines.train.monitor import Monitor, monitoring
from pipelines.train.progress import DivergedError, quiet_ray_train, stop_on_nan
from pipelines.train.run_record import flat
from pipelines.train.snapshots import SNAPSHOTS, SnapshotWriter, find_snapshot, load_snapshot, resume
from pipelines.train.trainer import run
from pipelines.train.vae_config import VaeTraining
from pipelines.train.vae_state import VaeState, start_vae, stats_of, stats_state
from pipelines.vae_source import on_every_node

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from ray.data import Dataset

__all__ = ["check", "export", "fit", "record_of", "set_scale", "train"]

# Batches of each worker, after the last step, from which the scaling factor is measured.
STATISTICS_BATCHES = 64


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


def record_of(source: str, config: VaeTraining) -> dict[str, object]:
    """What a run is of, flat: the config, and which shards, first VAE and perceptual network it means."""
    content: dict[str, object] = {
        "train": config.model_dump(mode="json"),
        "input": {
            "url": source,
            "shards": version_of_all(f"{s.name} {s.version}" for s in list_shards(source)),
        },
        "init": {"fingerprint": autoencoder.load(config.init).fingerprint if config.init else None},
    }
    if config.perceptual:
        perceptual = load_perceptual(config.perceptual)
        content["perceptual"] = {"extractor": perceptual.name, "fingerprint": perceptual.fingerprint}
    return flat(content)


def fit(source: str, config: VaeTraining, out: Path) -> None:
    """Train on Ray until the last step; snapshots and metrics go to ``out``.

    Raises DivergedError where a loss, the gradient or a weight is no finite number.
    """
    places = {
        "init": on_every_node(config.init) if config.init else None,
        "perceptual": on_every_node(config.perceptual) if config.perceptual else None,
    }
    config, out = config.model_copy(update=places), out.absolute()
    result = run(
        _train_worker,
        {"config": config, "out": out},
        num_workers=config.num_workers,
        num_gpus=config.num_gpus,
        resources=config.resources,
        max_failures=config.max_failures,
        storage=out,
        datasets={"train": partial(_crops_left, CropOrder.of(source, config), config, out)},
    )
    # Of Ray Train v2, where mypy sees v1.
    diverged: str | None = result.return_value  # type: ignore[attr-defined]
    if diverged is not None:
        raise DivergedError(diverged)


def export(out: Path, config: VaeTraining) -> None:
    """Write the last snapshot's EMA weights into ``out`` in diffusers' format, in ``config.dtype``."""
    ema = averaged(start_vae(config), constant_decay(0.0))
    vae: AutoencoderKL = ema.module
    empty = (0.0,) * int(vae.config["latent_channels"])
    state = {"ema": ema.state_dict(), "latents": stats_state(LatentStats(0, empty, empty))}
    load_snapshot(out / SNAPSHOTS, find_snapshot(out / SNAPSHOTS).step, state)
    if config.parts == "all":
        set_scale(vae, stats_of(state["latents"]))
    # diffusers notes where a model was loaded from: this machine's path has no place in an export.
    vae.register_to_config(_name_or_path="")
    # Not vae.to: diffusers warns of every cast, whether or not the model minds it.
    nn.Module.to(vae, torch.float16 if config.dtype == "fp16" else torch.float32)
    partial_folder = out / ".vae.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    vae.save_pretrained(partial_folder)
    # The weights before config.json, without which this is no VAE's folder.
    for file in sorted(partial_folder.iterdir(), reverse=True):
        file.replace(out / file.name)
    shutil.rmtree(partial_folder)


def set_scale(vae: "AutoencoderKL", stats: LatentStats) -> None:
    """Record the measured scale of the latents in the VAE's config.

    ``scaling_factor`` alone gives std 1 over all channels; with ``latents_mean`` and ``latents_std``,
    as diffusers combines the three, every channel has mean 0 and std 1.
    """
    factor = stats.scaling_factor
    vae.register_to_config(
        scaling_factor=round(factor, 5),
        latents_mean=[round(mean, 5) for mean in stats.mean_C],
        latents_std=[round(std * factor, 5) for std in stats.std_C],
    )


def _crops_left(order: CropOrder, config: VaeTraining, out: Path) -> "Dataset":
    """Ray asks for it whenever it starts the workers: from the snapshot on that they will find."""
    import ray.data

    # This is another process than the driver, whose bars would be drawn between the lines of the training.
    ray.data.DataContext.get_current().enable_progress_bars = False
    return crop_dataset(
        order,
        after_step=find_snapshot(out / SNAPSHOTS).step,
        num_steps=config.steps + STATISTICS_BATCHES,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
    )


def _train_worker(loop: dict[str, Any]) -> str | None:
    """Returns why the run diverged. Were that raised, Ray would start again what ends the same way."""
    import ray.train
    from ray.train.torch import prepare_model

    from pipelines.train.torch_backend import training_device

    config: VaeTraining = loop["config"]
    quiet_ray_train()
    if config.threads:
        torch.set_num_threads(config.threads)
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    shard = ray.train.get_dataset_shard("train")

    def batches_after(step: int) -> Iterator[Tensor]:
        rows = WINDOW_BATCHES * config.batch_size // world
        windows = shard.iter_batches(batch_size=rows, batch_format="numpy", drop_last=True)
        images = (window["image"] for window in windows)
        return shuffled_batches(images, seed=config.seed, rank=rank, after_step=step)

    device = training_device()
    state = VaeState(config, device, partial(prepare_model, move_to_device=device), rank=rank)
    try:
        train(state, batches_after, loop["out"])
    except DivergedError as error:
        return str(error)
    return None


def train(state: VaeState, batches_after: Callable[[int], Iterator[Tensor]], out: Path) -> None:
    """All steps that are left, on this rank; the snapshot of the last one is published when it returns.

    batches_after: from a step to this rank's shares of the batches after it. Raises DivergedError on every
    rank at the first interval with a loss, gradient or weight that is no finite number.
    """
    start = resume(state, out / SNAPSHOTS)
    with monitoring(out, start) as monitors:
        _train_from(start, state, batches_after, out, monitors)


def _train_from(
    start: int,
    state: VaeState,
    batches_after: Callable[[int], Iterator[Tensor]],
    out: Path,
    monitors: Sequence[Monitor],
) -> None:
    config = state.config
    log = MetricsLog("train-vae", config, out / METRICS_FILE, start, state.rank, monitors)
    writer = SnapshotWriter(out / SNAPSHOTS, config.keep_checkpoints)
    batches = Timed(batches_after(start))
    for step in range(start + 1, config.steps + 1):
        terms, norm = state.step(next(batches), step)
        log.add(terms, norm)
        last = step == config.steps
        if last or step % config.log_every == 0:
            metrics = log.close(step, batches.take_waited_s())
            stop_on_nan(metrics)
            log.write(metrics, state.optimisation.optimizer.param_groups[0]["lr"])
        if last or step % config.snapshot_every == 0:
            # Never into a snapshot. The weights are the same on all ranks, so all of them stop.
            stop_on_nan({"step": step, "norm of the weights": float(state.weight_norm())})
            if last and config.parts == "all":
                state.latents = _latent_stats(state, islice(batches, STATISTICS_BATCHES))
            writer.write(step, state.state())
    writer.wait()


def _latent_stats(state: VaeState, batches: Iterator[Tensor]) -> LatentStats:
    """Of the EMA weights' latents, over the batches of all ranks."""
    encoder = autoencoder.Autoencoder(state.ema.module)
    stats = LatentStats.merge_all(LatentStats.of(encoder.encode(images)) for images in batches)
    parts = [stats]
    if dist.is_initialized():
        parts = [stats] * dist.get_world_size()
        dist.all_gather_object(parts, stats)
    return LatentStats.merge_all(parts)
