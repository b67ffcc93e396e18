"""Ray Train, set up the one way in which this project uses it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.data import Dataset
    from ray.train import Result

__all__ = ["run"]


def run(
    worker: Callable[[dict[str, Any]], None],
    loop: dict[str, Any],
    *,
    num_workers: int,
    num_gpus: float,
    storage: Path,
    datasets: "Mapping[str, Dataset] | None" = None,
) -> "Result":
    """Run ``worker(loop)`` on every training worker; the last two checkpoints stay under ``storage``.

    num_gpus: of each worker; with 0 it trains on one CPU of Ray's count.
    """
    from ray.train import CheckpointConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    return TorchTrainer(
        worker,
        train_loop_config=loop,
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=num_gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": num_gpus} if num_gpus else {})},
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # v2 of Ray Train, which mypy takes for v1
            name="ray_train",
            storage_path=str(storage.absolute()),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        datasets=dict(datasets or {}),
    ).fit()
