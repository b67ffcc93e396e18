"""Train a U-Net on a latent dataset with Ray Train: DDP, EMA, classifier-free condition dropout.

Everything random is keyed by (seed, position in the run), so a run does not depend on how many
workers share the global batch, up to the rounding of the gradient sum.
"""

import json
import os
import platform
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ldm import checkpoint, unet
from ldm.checkpoint import CheckpointInfo
from ldm.conditioning import ClassConditioner, Conditioning, drop
from ldm.ema import averaged
from ldm.errors import UserError
from ldm.latents import Whitening, keyed_normal
from ldm.objective import NoiseSchedule, diffusion_loss, min_snr_weight
from ldm.seeds import keyed_seed
from pipelines.dataset import LatentDataset
from pipelines.train.loader import LatentBatch, batches, check_batch_size, load_rows
from pipelines.train.progress import Progress, quiet_ray_train, stop_on_nan
from pipelines.train.schedule import lr_factor
from pipelines.train.trainer import run

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from ray.train import Result

__all__ = ["METRICS_FILE", "UnetTraining", "fit", "plan"]

# In every checkpoint: one JSON object for each logging interval so far.
METRICS_FILE = "metrics.jsonl"


class UnetTraining(BaseModel):
    """How to train a U-Net on cached latents."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = Field("small", description=f"layout: {', '.join(unet.PRESETS)}")
    prediction: Literal["epsilon", "v_prediction", "flow"] = "v_prediction"
    min_snr_gamma: PositiveFloat | None = Field(5.0, description="of the loss weight; none for a uniform one")
    whitening: Literal["data", "vae"] = Field(
        "data", description="scale of the latents: measured on the dataset, or the VAE's own config"
    )
    condition_dropout: float = Field(
        0.1, ge=0, le=1, description="share of labels replaced by the null class"
    )
    steps: PositiveInt = 10_000
    batch_size: PositiveInt = Field(64, description="latents per step over all workers")
    learning_rate: PositiveFloat = 3e-4
    warmup_steps: PositiveInt = 200
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    ema_decay: float = Field(0.999, ge=0, lt=1)
    seed: int = 0
    log_every: PositiveInt = 100
    checkpoint_every: PositiveInt = 5_000
    num_workers: PositiveInt = 1
    num_gpus: float = Field(0.0, ge=0, description="per worker")
    threads: PositiveInt | None = Field(None, description="torch threads per worker; default: Ray's choice")

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule(prediction=self.prediction)


def plan(dataset: LatentDataset, config: UnetTraining, vae: str | None) -> CheckpointInfo:
    """Check all that can be wrong before Ray is started; returns what the checkpoint will say.

    vae: the VAE that will decode, or None for the dataset's own. UserError where it is not the one
    that encoded, or where batch, preset or latent size do not fit.
    """
    from ldm import autoencoder

    header = dataset.header
    vae_model = autoencoder.load(vae or header.vae)
    checkpoint.check_vae(vae_model, header.vae_fingerprint, f"latent dataset {dataset.url}")
    side = header.preprocess.sizes_px[0] // header.f
    model = _build(config, (header.channels, side, side), header.class_names)
    multiple = unet.size_multiple(model)
    if side % multiple:
        raise UserError(
            f"U-Net preset {config.preset} cannot take {side}×{side} latents",
            allowed=f"multiples of {multiple}",
        )
    if config.batch_size % config.num_workers:
        raise UserError(
            f"a batch of {config.batch_size} cannot be shared by {config.num_workers} workers evenly"
        )
    derived = dataset.derived()
    if derived.stats is None:
        raise UserError(f"latent dataset {dataset.url} has no rows", do="see its quarantine folder")
    check_batch_size(derived.totals.rows, config.batch_size)
    whitening = Whitening.from_stats(derived.stats) if config.whitening == "data" else vae_model.whitening
    return CheckpointInfo(
        step=0,
        latent_shape=(header.channels, side, side),
        shift=whitening.shift_C,
        scale=whitening.scale_C,
        vae=vae or header.vae,
        vae_fingerprint=header.vae_fingerprint,
        class_names=header.class_names,
    )


def fit(dataset: LatentDataset, config: UnetTraining, info: CheckpointInfo, storage: Path) -> "Result":
    """Train on Ray; checkpoints (see `ldm.checkpoint`) are kept under ``storage``."""
    loop = {"dataset": dataset.url, "config": config, "info": info}
    return run(_train_worker, loop, num_workers=config.num_workers, num_gpus=config.num_gpus, storage=storage)


def loss_of(
    model: nn.Module, batch: LatentBatch, config: UnetTraining, info: CheckpointInfo, device: torch.device
) -> Tensor:
    """Mean loss of one rank's share of a batch, scalar (Ho et al. 2020, algorithm 1)."""
    schedule = config.noise_schedule
    x0 = info.whitening.normalise(batch.z_BChw).to(device)
    seeds = [keyed_seed("noise", config.seed, position) for position in batch.positions_B]
    noise = keyed_normal(seeds, x0.shape[1:]).to(device)
    u_B, keep_B = _uniform_pairs(batch, config)
    t_B = schedule.timesteps(u_B).to(device)
    conditioning = _conditioning(batch.labels_B, keep_B, info).to(device)
    prediction = unet.predict(model, schedule.add_noise(x0, noise, t_B), t_B, conditioning)
    weight_B = min_snr_weight(schedule, t_B, config.min_snr_gamma) if config.min_snr_gamma else None
    return diffusion_loss(prediction, schedule.target(x0, noise, t_B), weight_B).mean()


def _uniform_pairs(batch: LatentBatch, config: UnetTraining) -> tuple[Tensor, Tensor]:
    """For each row: u in [0, 1) for its timestep, and whether it keeps its condition."""
    pairs = [
        torch.rand(2, generator=torch.Generator().manual_seed(keyed_seed("t", config.seed, p)))
        for p in batch.positions_B
    ]
    pairs_B2 = torch.stack(pairs)
    return pairs_B2[:, 0], pairs_B2[:, 1] >= config.condition_dropout


def _conditioning(labels_B: Tensor, keep_B: Tensor, info: CheckpointInfo) -> Conditioning:
    if not info.class_names:
        return Conditioning()
    # A row without a label trains the unconditional model.
    labelled_B = labels_B >= 0
    return drop(
        Conditioning(class_labels=labels_B.clamp(min=0)),
        keep_B & labelled_B,
        ClassConditioner(info.class_names).null,
    )


def _build(
    config: UnetTraining, shape: tuple[int, int, int], class_names: tuple[str, ...] | None
) -> "UNet2DConditionModel":
    return unet.build(
        config.preset,
        in_channels=shape[0],
        num_classes=len(class_names) if class_names else None,
        sample_size=shape[1],
    )


def _train_worker(loop: dict[str, Any]) -> None:
    import ray.train
    from ray.train.torch import get_device, prepare_model

    config: UnetTraining = loop["config"]
    info: CheckpointInfo = loop["info"]
    quiet_ray_train()
    if config.threads:
        torch.set_num_threads(config.threads)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = torch.device(get_device())
    torch.manual_seed(config.seed)
    raw = _build(config, info.latent_shape, info.class_names).to(device)
    ema = averaged(raw, config.ema_decay)
    model = prepare_model(raw)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, config.steps, config.warmup_steps)
    )
    rows = load_rows(LatentDataset.open(loop["dataset"]))
    data = batches(rows, seed=config.seed, batch_size=config.batch_size, rank=rank, world=world)
    progress = Progress("train", config.steps, config.batch_size, quiet=rank > 0)
    loss_sum = torch.zeros((), device=device)
    history: list[dict[str, float]] = []
    for step, batch in zip(range(1, config.steps + 1), data, strict=False):
        loss = loss_of(model, batch, config, info, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()
        ema.update_parameters(raw)
        loss_sum += loss.detach()
        last = step == config.steps
        if last or step % config.log_every == 0:
            since = step % config.log_every or config.log_every
            metrics = {"step": step, "loss": float(loss_sum) / since, "gradient_norm": float(norm)}
            stop_on_nan(metrics)
            metrics |= progress.line(step, metrics)
            history.append(metrics)
            loss_sum.zero_()
            if last or step % config.checkpoint_every == 0:
                _report_checkpoint(history, ema.module, raw, config, info, rank)
            else:
                ray.train.report(metrics)


def _report_checkpoint(
    history: list[dict[str, float]],
    ema: nn.Module,
    last: nn.Module,
    config: UnetTraining,
    info: CheckpointInfo,
    rank: int,
) -> None:
    import ray.train

    with TemporaryDirectory() as folder:
        if rank == 0:
            checkpoint.save(
                Path(folder),
                ema=ema,
                last=last,
                scheduler_config=config.noise_schedule.scheduler_config(),
                info=info.model_copy(update={"step": int(history[-1]["step"])}),
            )
            lines = [json.dumps(metrics) + "\n" for metrics in history]
            (Path(folder) / METRICS_FILE).write_text("".join(lines))
        where = {"node": platform.node(), "pid": os.getpid(), "device": str(next(last.parameters()).device)}
        ray.train.report(
            {**history[-1], **where}, ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
        )
