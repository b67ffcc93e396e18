"""What a person watches while a model trains: TensorBoard, Ray's metrics, W&B where it is configured."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import ray
import torch.distributed as dist
from numpy.typing import NDArray

from pipelines.train.ray_metrics import RayMetrics
from pipelines.train.wandb_run import WandbConfig, WandbRun

__all__ = ["TENSORBOARD", "Monitor", "TensorBoard", "monitoring"]

# In the output: event files, one for each start.
TENSORBOARD = "tensorboard"
# tensorboardX hands events to a thread: what a kill may take with it is as old as this.
FLUSH_S = 1


class Monitor(Protocol):
    """Where metrics and sample grids are shown, by step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def show(self, step: int, image_HW3: NDArray[np.uint8]) -> None: ...

    def close(self) -> None: ...


@contextmanager
def monitoring(
    out: Path, start: int, wandb: WandbConfig | None = None, settings: Mapping[str, object] | None = None
) -> Iterator[list[Monitor]]:
    """The monitors of a run that goes on from step ``start``; none on another rank than the first.

    settings: what W&B shows as the run's config.
    """
    with ExitStack() as stack:
        monitors: list[Monitor] = []
        if not dist.is_initialized() or dist.get_rank() == 0:
            monitors.append(TensorBoard(out / TENSORBOARD, start))
            if ray.is_initialized():
                monitors.append(RayMetrics(out.name))
            if wandb:
                monitors.append(WandbRun(wandb, out, settings or {}))
        for monitor in monitors:
            stack.callback(monitor.close)
        yield monitors


class TensorBoard:
    """An event file; what earlier ones hold of the steps after ``start`` is hidden, as it is done again."""

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboardX import SummaryWriter

        # Files are told apart by the second and the suffix: two of the same hold the same steps.
        self._writer = SummaryWriter(
            str(folder), purge_step=start + 1, flush_secs=FLUSH_S, filename_suffix=f".after-{start:08d}"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Single precision, as TensorBoard's scalars are."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, image_HW3: NDArray[np.uint8]) -> None:
        self._writer.add_image("samples", image_HW3, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
