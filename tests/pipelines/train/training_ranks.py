"""Ranks of a training as plain processes with gloo, without Ray: what the elastic tests start.

usage: training_ranks.py RANK WORLD RENDEZVOUS FOLDER DATASET CONFIG STOP_AFTER

CONFIG: UnetTraining as JSON. STOP_AFTER: the step after which all ranks stop, perhaps before the run's end.
"""

import json
import os
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.train.state import TrainState

__all__ = ["Stopped", "stop", "train_on"]

ROOT = Path(__file__).parents[3]


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
    shared = [str(folder / f"rendezvous-{uuid.uuid4().hex}"), str(folder), str(dataset), json.dumps(config)]
    shared.append(str(stop_after or config["steps"]))
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), *shared],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors[-3000:]


def main(rank: str, world: str, rendezvous: str, folder: str, url: str, config: str, stop_after: str) -> None:
    import torch
    import torch.distributed as dist

    from pipelines.dataset import LatentDataset
    from pipelines.train.config import UnetTraining
    from pipelines.train.plan import plan
    from pipelines.train.state import TrainState
    from pipelines.train.unet import train

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world))
    dataset, training = LatentDataset.open(url), UnetTraining.model_validate_json(config)
    state = TrainState(training, plan(dataset, training, None), torch.device("cpu"))
    stop(state, int(stop_after))
    train(state, dataset, Path(folder), lambda metrics: None)
    dist.destroy_process_group()


if __name__ == "__main__":
    with suppress(Stopped):
        main(*sys.argv[1:])
