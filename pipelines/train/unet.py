"""Train a U-Net on a latent dataset with Ray Train, from its newest snapshot on.

Everything random is keyed by (seed, epoch, key) or (seed, step). So a run that was stopped at any step ends
with the weights of one that was not, and another number of workers changes only the rounding of sums.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from ldm import checkpoint
from ldm.checkpoint import CheckpointInfo
from ldm.ema import averaged, constant_decay
from pipelines.dataset import LatentDataset
from pipelines.train.config import UnetTraining
from pipelines.train.loader import LatentBatch
from pipelines.train.metrics_log import METRICS_FILE, MetricsLog, Timed
from pipelines.train.monitor import Monitor, monitoring
from pipelines.train.plan import build_unet, open_loader
from pipelines.train.progress import DivergedError, quiet_ray_train, stop_on_nan
from pipelines.train.sample_grid import SAMPLES, GridSampler
from pipelines.train.snapshots import SNAPSHOTS, SnapshotWriter, find_snapshot, load_snapshot, resume
from pipelines.train.state import TrainState, trained_weights
from pipelines.train.trainer import run
from pipelines.vae_source import on_every_node

__all__ = ["METRICS_FILE", "SNAPSHOTS", "export", "fit", "loop_of"]

Metrics: TypeAlias = dict[str, float]


def fit(dataset: LatentDataset, config: UnetTraining, info: CheckpointInfo, out: Path) -> None:
    """Train on Ray until the last step; snapshots and metrics go to ``out``.

    Raises DivergedError where the loss or the gradient is no finite number.
    """
    result = run(
        _train_worker,
        loop_of(dataset, config, info, out),
        num_workers=config.num_workers,
        min_workers=config.min_workers,
        resize_check_s=config.resize_check_s,
        num_gpus=config.num_gpus,
        resources=config.resources,
        max_failures=config.max_failures,
        storage=out,
    )
    # Of Ray Train v2, where mypy sees v1.
    diverged: str | None = result.return_value  # type: ignore[attr-defined]
    if diverged is not None:
        raise DivergedError(diverged)


def loop_of(dataset: LatentDataset, config: UnetTraining, info: CheckpointInfo, out: Path) -> dict[str, Any]:
    """What every worker gets: folders are absolute, as workers have another working directory."""
    init = on_every_node(config.init) if config.init else None
    return {
        "dataset": dataset.url,
        "config": config.model_copy(update={"init": init}),
        "info": info.model_copy(update={"vae": on_every_node(info.vae)}),
        "out": out.absolute(),
    }


def export(out: Path, config: UnetTraining, info: CheckpointInfo) -> None:
    """Write the last snapshot as a checkpoint (see `ldm.checkpoint`) into ``out``."""
    step = find_snapshot(out / SNAPSHOTS).step
    last = build_unet(config, info)
    ema = averaged(last, constant_decay(0.0))
    load_snapshot(out / SNAPSHOTS, step, trained_weights(last, ema))
    checkpoint.save(
        out,
        ema=ema.module,
        last=last,
        scheduler_config=config.noise_schedule.scheduler_config(),
        info=info.model_copy(update={"step": step}),
    )


def _train_worker(loop: dict[str, Any]) -> str | None:
    """Returns why the run diverged. Were that raised, Ray would start again what ends the same way."""
    from pipelines.train.torch_backend import training_device

    config: UnetTraining = loop["config"]
    quiet_ray_train()
    if config.threads:
        torch.set_num_threads(config.threads)
    state = TrainState(config, loop["info"], training_device())
    try:
        train(state, LatentDataset.open(loop["dataset"]), loop["out"], _report)
    except DivergedError as error:
        return str(error)
    return None


def train(state: TrainState, dataset: LatentDataset, out: Path, report: Callable[[Metrics], None]) -> None:
    """All steps that are left, on this rank; the snapshot of the last one is published when it returns.

    report: called by every rank with the metrics at each snapshot. Raises DivergedError on every rank at the
    first interval with a loss or gradient that is no finite number.
    """
    start = resume(state, out / SNAPSHOTS)
    config = state.config
    with monitoring(out, start, config.wandb, config.model_dump(mode="json")) as monitors:
        _train_from(start, state, dataset, out, report, monitors)


def _train_from(
    start: int,
    state: TrainState,
    dataset: LatentDataset,
    out: Path,
    report: Callable[[Metrics], None],
    monitors: list[Monitor],
) -> None:
    config = state.config
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loader = open_loader(dataset, config)
    log = MetricsLog("train", config, out / METRICS_FILE, start, rank, monitors)
    writer = SnapshotWriter(out / SNAPSHOTS, config.keep_checkpoints)
    held_out = loader.validation(rank=rank, world=world)
    grids = GridSampler(state, loader, out / SAMPLES, start)
    batches = Timed(loader.batches(rank=rank, world=world, first=start))
    for step in range(start + 1, config.steps + 1):
        loss, norm = state.step(next(batches), step)
        log.add({"loss": loss}, norm)
        last = step == config.steps
        if last or step % config.log_every == 0:
            metrics = log.close(step, batches.take_waited_s())
            if last or step % config.validate_every < config.log_every:
                with log.pause():
                    metrics |= _validation(state, held_out)
            stop_on_nan(metrics)
            log.write(metrics, state.optimizer.param_groups[0]["lr"])
            if grids.due(step):
                with log.pause():
                    log.show(step, grids.draw(step))
        if last or step % config.snapshot_every == 0:
            # Never into a snapshot. The norm is that of all ranks, so all of them stop.
            stop_on_nan({"step": step, "gradient_norm": float(norm)})
            writer.write(step, state.state())
            # A report waits until Ray's controller looks, every two seconds: not for every line.
            report({"step": step, "gradient_norm": float(norm)})
    writer.wait()


def _report(metrics: Metrics) -> None:
    import ray.train

    ray.train.report(metrics)


def _validation(state: TrainState, held_out: list[LatentBatch]) -> dict[str, float]:
    sums = torch.tensor(state.validate(held_out), dtype=torch.float64, device=state.device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return {"validation_loss": float(sums[0] / sums[1])} if sums[1] else {}
