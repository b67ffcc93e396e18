"""The metrics of a training run: means over intervals, in a file that resumed runs continue."""

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipelines.train.monitor import Monitor
from pipelines.train.progress import Progress

__all__ = ["METRICS_FILE", "MetricsLog", "Timed"]

# In the output: one JSON object for each logging interval so far.
METRICS_FILE = "metrics.jsonl"
Batch = TypeVar("Batch")


class Run(Protocol):
    """What is to be known of a run's config."""

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...


class Timed(Iterator[Batch]):
    """Batches, and how long was waited for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches, self.waited_s = batches, 0.0

    def __next__(self) -> Batch:
        started = perf_counter()
        batch = next(self.batches)
        self.waited_s += perf_counter() - started
        return batch

    def take_waited_s(self) -> float:
        waited_s, self.waited_s = self.waited_s, 0.0
        return waited_s


class MetricsLog:
    """Sums of an interval, their mean over all ranks; the metrics file and the monitors (rank 0)."""

    def __init__(
        self, name: str, config: Run, path: Path, start: int, rank: int, monitors: Sequence[Monitor]
    ) -> None:
        self.path, self.rank, self.monitors = path, rank, monitors
        self.progress = Progress(name, config.steps, config.batch_size, first_step=start, quiet=rank > 0)
        self.names: list[str] = []
        self.terms: list[torch.Tensor] = []
        self.norm = torch.zeros(())
        self.started = perf_counter()
        if rank == 0:
            self._forget_after(start)

    def add(self, terms: Mapping[str, torch.Tensor], norm: torch.Tensor) -> None:
        """Scalars of a step: the same names at each, and the gradient's norm."""
        self.names = list(terms)
        self.terms.append(torch.stack(list(terms.values())))
        self.norm = norm

    def close(self, step: int, waited_s: float) -> dict[str, float]:
        """Metrics of the steps since the last call: terms and gradient norm are the same on all ranks."""
        means = torch.stack(self.terms).double().mean(0)
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        seconds = perf_counter() - self.started
        self.terms, self.started = [], perf_counter()
        return {
            "step": step,
            **dict(zip(self.names, means.tolist(), strict=True)),
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
            where = {
                "workers": dist.get_world_size() if dist.is_initialized() else 1,
                "node": platform.node(),
                "pid": os.getpid(),
                "device": str(self.norm.device),
            }
            with self.path.open("a") as file:
                file.write(json.dumps(metrics | where) + "\n")

    def show(self, step: int, image_HW3: NDArray[np.uint8] | None) -> None:
        """Pass a sample grid to the monitors; None on a rank that has none."""
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
