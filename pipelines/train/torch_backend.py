"""Ray Train's torch backend, also for GPUs that Ray only counts, where there is no device behind them.

Ray takes NCCL and the device cuda:0 for every worker that was given a GPU. On a machine without one, whose
nodes were started with ``--num-gpus`` to try where work lands, both fail.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from ray.train.torch import TorchConfig, get_device
from ray.train.torch.config import _TorchBackend

__all__ = ["CountedGpus", "training_device"]


def training_device() -> torch.device:
    """The device that Ray Train gave this worker; the CPU where its GPU is only counted."""
    return torch.device(get_device()) if torch.cuda.is_available() else torch.device("cpu")


@dataclass
class CountedGpus(TorchConfig):
    """Ray's own, with Gloo in place of NCCL unless every worker has a CUDA device."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        # Asked of the workers: the driver may be on a node of another kind.
        if not all(worker_group.execute(torch.cuda.is_available)):
            backend_config = replace(backend_config, backend="gloo")
        super().on_start(worker_group, backend_config)
