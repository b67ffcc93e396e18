"""Ray Train, set up the one way in which this project uses it."""

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.data import Dataset
    from ray.train import Result

__all__ = ["run"]

# glibc would give the memory of every step's gradients back to the system, and fault it in again: a
# tenth of a CPU's step (`ldm bench train`). One arena, since training does not run in the main thread.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
}


def run(
    worker: Callable[[dict[str, Any]], object],
    loop: dict[str, Any],
    *,
    num_workers: int,
    num_gpus: float,
    resources: Mapping[str, float],
    storage: Path,
    min_workers: int | None = None,
    resize_check_s: float = 60.0,
    max_failures: int = 0,
    datasets: "Mapping[str, Callable[[], Dataset]] | None" = None,
) -> "Result":
    """Run ``worker(loop)`` on every training worker; Ray Train keeps its own notes under ``storage``.

    num_gpus: of each worker; with 0 it trains on one CPU of Ray's count. resources: custom ones of each.
    min_workers: go on with as few where there are no more, and look every resize_check_s whether there is
    room for another number; max_failures: how often workers that died are started again. datasets: asked for
    whenever workers are started, and read in their order.
    """
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.train.torch_backend import CountedGpus

    return TorchTrainer(
        worker,  # type: ignore[arg-type]  # what rank 0 returns becomes the result's return_value
        train_loop_config=loop,
        torch_config=CountedGpus(),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # as below
            num_workers=(min_workers, num_workers) if min_workers else num_workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=resize_check_s,
            use_gpu=num_gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": num_gpus} if num_gpus else {}), **resources},
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # v2 of Ray Train, which mypy takes for v1
            # A name of its own: Ray would else go on with what it remembers of the run before.
            name=f"ray_train/{time.strftime('%Y-%m-%d_%H-%M-%S')}-{uuid.uuid4().hex[:6]}",
            storage_path=str(storage.absolute()),
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": MALLOC},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        datasets=dict(datasets or {}),
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    ).fit()
