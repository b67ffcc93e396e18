"""Train a U-Net on a latent dataset with Ray Train, from its newest snapshot on.

Everything random is keyed by (seed, epoch, key) or (seed, step). So a run that was stopped at any step ends
with the weights of one that was not, and another number of workers changes only the rounding of sums.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ldm import checkpoint
from ldm.checkpoint import CheckpointInfo
from ldm.ema import averaged, constant_decay
from pipelines.dataset import LatentDataset
from pipelines.train.config import UnetTraining
from pipelines.train.loader import LatentBatch
from pipelines.train.monitor import Monitor, monitoring
from pipelines.train.plan import build_unet, open_loader
from pipelines.train.progress import DivergedError, Progress, quiet_ray_train, stop_on_nan
from pipelines.train.sample_grid import SAMPLES, GridSampler
from pipelines.train.snapshots import SnapshotWriter, find_snapshot, load_snapshot
from pipelines.train.state import TrainState
from pipelines.train.trainer import run
from pipelines.vae_source import on_every_node

__all__ = ["METRICS_FILE", "SNAPSHOTS", "export", "fit"]

# In the output: one JSON object for each logging interval so far.
METRICS_FILE = "metrics.jsonl"
SNAPSHOTS = "snapshots"
Metrics: TypeAlias = dict[str, float]


def fit(dataset: LatentDataset, config: UnetTraining, info: CheckpointInfo, out: Path) -> None:
    """Train on Ray until the last step; snapshots and metrics go to ``out``.

    Raises DivergedError where the loss or the gradient is no finite number.
    """
    info = info.model_copy(update={"vae": on_every_node(info.vae)})
    loop = {"dataset": dataset.url, "config": config, "info": info, "out": out.absolute()}
    result = run(
        _train_worker,
        loop,
        num_workers=config.num_workers,
        min_workers=config.min_workers,
        num_gpus=config.num_gpus,
        max_failures=config.max_failures,
        storage=out,
    )
    # Of Ray Train v2, where mypy sees v1.
    diverged: str | None = result.return_value  # type: ignore[attr-defined]
    if diverged is not None:
        raise DivergedError(diverged)


def export(out: Path, config: UnetTraining, info: CheckpointInfo) -> None:
    """Write the last snapshot as a checkpoint (see `ldm.checkpoint`) into ``out``."""
    step = find_snapshot(out / SNAPSHOTS).step
    last = build_unet(config, info)
    ema = averaged(last, constant_decay(0.0))
    state = {"model": last.state_dict(), "ema": ema.state_dict()}
    load_snapshot(out / SNAPSHOTS, step, state)
    checkpoint.save(
        out,
        ema=ema.module,
        last=last,
        scheduler_config=config.noise_schedule.scheduler_config(),
        info=info.model_copy(update={"step": step}),
    )


def _train_worker(loop: dict[str, Any]) -> str | None:
    """Returns why the run diverged. Were that raised, Ray would start again what ends the same way."""
    from ray.train.torch import get_device

    config: UnetTraining = loop["config"]
    quiet_ray_train()
    if config.threads:
        torch.set_num_threads(config.threads)
    state = TrainState(config, loop["info"], torch.device(get_device()))
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
    start = _resume(state, out / SNAPSHOTS)
    with monitoring(state.config, out, start) as monitors:
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
    log = _Log(config, out / METRICS_FILE, start, rank, monitors)
    writer = SnapshotWriter(out / SNAPSHOTS, config.keep_checkpoints)
    held_out = loader.validation(rank=rank, world=world)
    grids = GridSampler(state, loader, out / SAMPLES, start)
    batches = _Timed(loader.batches(rank=rank, world=world, first=start))
    for step in range(start + 1, config.steps + 1):
        loss, norm = state.step(next(batches), step)
        log.add(loss, norm)
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


def _resume(state: TrainState, snapshots: Path) -> int:
    """Load the newest valid snapshot, the same on every rank; returns its step."""
    found = [find_snapshot(snapshots).step if not dist.is_initialized() or dist.get_rank() == 0 else 0]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[0]:
        stored = state.state()
        load_snapshot(snapshots, found[0], stored)
        state.restore(stored)
    return found[0]


def _validation(state: TrainState, held_out: list[LatentBatch]) -> dict[str, float]:
    sums = torch.tensor(state.validate(held_out), dtype=torch.float64, device=state.device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return {"validation_loss": float(sums[0] / sums[1])} if sums[1] else {}


class _Timed(Iterator[LatentBatch]):
    """Batches, and how long was waited for them."""

    def __init__(self, batches: Iterator[LatentBatch]) -> None:
        self.batches, self.waited_s = batches, 0.0

    def __next__(self) -> LatentBatch:
        started = perf_counter()
        batch = next(self.batches)
        self.waited_s += perf_counter() - started
        return batch

    def take_waited_s(self) -> float:
        waited_s, self.waited_s = self.waited_s, 0.0
        return waited_s


class _Log:
    """Sums of an interval, their mean over all ranks; the metrics file and the monitors (rank 0)."""

    def __init__(
        self, config: UnetTraining, path: Path, start: int, rank: int, monitors: list[Monitor]
    ) -> None:
        self.path, self.rank, self.monitors = path, rank, monitors
        self.progress = Progress("train", config.steps, config.batch_size, first_step=start, quiet=rank > 0)
        self.losses: list[torch.Tensor] = []
        self.norm = torch.zeros(())
        self.started = perf_counter()
        if rank == 0:
            self._forget_after(start)

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        self.losses.append(loss)
        self.norm = norm

    def close(self, step: int, waited_s: float) -> dict[str, float]:
        """Metrics of the steps since the last call: loss and gradient norm are the same on all ranks."""
        loss = torch.stack(self.losses).double().mean()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        seconds = perf_counter() - self.started
        self.losses, self.started = [], perf_counter()
        return {
            "step": step,
            "loss": float(loss),
            "gradient_norm": float(self.norm),
            "data_wait_share": waited_s / seconds,
        }

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside counts in no rate and no share of time."""
        began = perf_counter()
        yield
        seconds = perf_counter() - began
        self.started += seconds
        self.progress.skip(seconds)

    def write(self, metrics: dict[str, float], learning_rate: float) -> None:
        """Print a line, append it to the file, and pass it to the monitors."""
        step = int(metrics["step"])
        metrics |= self.progress.line(step, metrics) | {"learning_rate": learning_rate}
        for monitor in self.monitors:
            monitor.log(step, {name: value for name, value in metrics.items() if name != "step"})
        if self.rank == 0:
            where = {"node": platform.node(), "pid": os.getpid(), "device": str(self.norm.device)}
            with self.path.open("a") as file:
                file.write(json.dumps(metrics | where) + "\n")

    def show(self, step: int, image_HW3: NDArray[np.uint8] | None) -> None:
        if image_HW3 is not None:
            for monitor in self.monitors:
                monitor.show(step, image_HW3)

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be done again, and one that was torn."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(kept))
        partial.replace(self.path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
