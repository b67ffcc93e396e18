"""Progress of a training run as one line per interval: steps/s, images/s, loss, time left."""

import logging
import math
import time
from collections.abc import Mapping

from ldm.errors import LdmError

__all__ = ["DivergedError", "Progress", "quiet_ray_train", "stop_on_nan"]


class DivergedError(LdmError):
    """A metric of the training run is no finite number."""


class Progress:
    """Prints where a run is. Ray forwards the lines of rank 0 to the driver; other ranks are quiet."""

    def __init__(
        self, name: str, num_steps: int, batch_size: int, *, first_step: int = 0, quiet: bool = False
    ) -> None:
        self.name, self.num_steps, self.batch_size, self.quiet = name, num_steps, batch_size, quiet
        self.started_s = self.last_s = time.monotonic()
        self.first_step = self.last_step = first_step

    def rates(self, step: int) -> dict[str, float]:
        """steps_per_s, images_per_s since the last call, seconds so far and seconds left."""
        now = time.monotonic()
        steps_per_s = (step - self.last_step) / max(now - self.last_s, 1e-9)
        mean_steps_per_s = (step - self.first_step) / max(now - self.started_s, 1e-9)
        self.last_s, self.last_step = now, step
        return {
            "steps_per_s": steps_per_s,
            "images_per_s": steps_per_s * self.batch_size,
            "elapsed_s": now - self.started_s,
            "left_s": (self.num_steps - step) / mean_steps_per_s,
        }

    def skip(self, seconds: float) -> None:
        """Leave time that went into something else than steps out of the next rates."""
        self.last_s += seconds

    def line(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Print one line for ``step``; returns the rates."""
        rates = self.rates(step)
        if not self.quiet:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "step")
            print(
                f"{self.name} {step}/{self.num_steps}  {rates['steps_per_s']:.2f} steps/s  "
                f"{rates['images_per_s']:.0f} images/s  {shown}  {clock(rates['left_s'])} left",
                flush=True,
            )
        return rates


def quiet_ray_train() -> None:
    """For a training worker: Ray Train logs every report in full beside the line that `Progress` prints.

    It does so with a logger named after the file, so the records are stopped where they leave.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_not_a_report)


def _is_not_a_report(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Reporting training result")


def stop_on_nan(metrics: Mapping[str, float]) -> None:
    """DivergedError that names metric and ``step``, which is one of them, unless all are finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise DivergedError(
                f"{name} is {value} at step {metrics['step']:.0f}; lower the learning rate or "
                f"start again from the last checkpoint"
            )


def clock(seconds: float) -> str:
    """``75`` → ``1:15``; ``3700`` → ``1:01:40``."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
