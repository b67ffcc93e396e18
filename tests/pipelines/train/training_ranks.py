"""Ranks of a training as plain processes with gloo, without Ray: what the elastic tests start.

usage: training_ranks.py RANK WORLD RENDEZVOUS FOLDER DATASET CONFIG   (CONFIG: UnetTraining as JSON)
"""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

__all__ = ["train_on"]

ROOT = Path(__file__).parents[3]


def train_on(world: int, folder: Path, dataset: Path, config: dict[str, Any]) -> None:
    """Train with ``world`` processes, from the newest snapshot in ``folder`` on."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = [str(folder / f"rendezvous-{uuid.uuid4().hex}"), str(folder), str(dataset), json.dumps(config)]
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


def main(rank: str, world: str, rendezvous: str, folder: str, url: str, config: str) -> None:
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
    train(state, dataset, Path(folder), lambda metrics: None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
