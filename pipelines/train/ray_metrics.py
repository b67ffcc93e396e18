"""What Prometheus can scrape of a training, through Ray's own metrics; Ray puts ``ray_`` before the names."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from ray.util.metrics import Gauge

__all__ = ["RayMetrics"]


class RayMetrics:
    """A monitor (see `pipelines.train.monitor`): the last value of each metric. Needs a connected Ray.

    run: tells trainings of one cluster apart.
    """

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._step = Gauge("ldm_train_step", "steps taken", ("run",))
        self._term = Gauge("ldm_train_loss_term", "a term that the loss is made of", ("run", "term"))
        self._gauges = {
            "loss": Gauge("ldm_train_loss", "mean of an interval", ("run",)),
            "validation_loss": Gauge("ldm_train_validation_loss", "of held-out rows", ("run",)),
            "gradient_norm": Gauge("ldm_train_gradient_norm", "before clipping", ("run",)),
            "learning_rate": Gauge("ldm_train_learning_rate", "of the last step", ("run",)),
            "steps_per_s": Gauge("ldm_train_steps_per_second", "of an interval", ("run",)),
            "images_per_s": Gauge("ldm_train_images_per_second", "of an interval, all workers", ("run",)),
            "data_wait_share": Gauge("ldm_train_data_wait_share", "of the time, waited for data", ("run",)),
            "left_s": Gauge("ldm_train_seconds_left", "at the mean rate so far", ("run",)),
            "elapsed_s": Gauge("ldm_train_seconds", "since this start", ("run",)),
        }

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step.set(step, self._run)
        for name, value in metrics.items():
            gauge = self._gauges.get(name)
            if gauge is not None:
                gauge.set(value, self._run)
            else:
                self._term.set(value, {**self._run, "term": name})

    def show(self, step: int, image_HW3: NDArray[np.uint8]) -> None:
        """Prometheus has no pictures."""

    def close(self) -> None:
        """What is set stays until the process ends."""
