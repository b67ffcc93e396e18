"""Trainings stopped from outside, and on several ranks without Ray: what the elastic tests start."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.forked_ranks import run_ranks

if TYPE_CHECKING:
    from pipelines.train.state import TrainState

__all__ = ["Stopped", "stop", "train_on"]


class Stopped(Exception):
    """Thrown in place of a kill."""


def stop(state: "TrainState", after: int) -> None:
    """Let ``state`` raise Stopped where it would begin the step after ``after``."""
    learn = state.step

    def step(batch: Any, number: int) -> Any:
        if number > after:
            raise Stopped
        return learn(batch, number)

    state.step = step  # type: ignore[method-assign]  # the seam where a kill would hit


def train_on(
    world: int, folder: Path, dataset: Path, config: dict[str, Any], *, stop_after: int | None = None
) -> None:
    """Train with ``world`` processes, from the newest snapshot in ``folder`` on."""
    folder.mkdir(parents=True, exist_ok=True)
    run_ranks(world, folder, _train, folder, dataset, config, stop_after or config["steps"])


def _train(rank: int, world: int, folder: Path, url: Path, config: dict[str, Any], stop_after: int) -> None:
    import torch

    from pipelines.dataset import LatentDataset
    from pipelines.train.config import UnetTraining
    from pipelines.train.plan import plan
    from pipelines.train.state import TrainState
    from pipelines.train.unet import train

    dataset, training = LatentDataset.open(url), UnetTraining.model_validate(config)
    state = TrainState(training, plan(dataset, training, None), torch.device("cpu"))
    stop(state, stop_after)
    with suppress(Stopped):
        train(state, dataset, folder, lambda metrics: None)
