"""Exponential moving average of a model's weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["averaged", "decay_at"]


def decay_at(num_updates: int, decay: float) -> float:
    """min(decay, (1 + n) / (10 + n)): short memory at first, so that the random start is forgotten."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of ``model`` in fp32 whose ``update_parameters(model)`` moves it by one EMA step.

    decay in [0, 1); ``.module`` is the averaged model, ready to be evaluated or saved. Buffers are
    copied from the model, not averaged.
    """

    def move(ema: Sequence[Tensor], current: Sequence[Tensor], num_updates: Any) -> None:
        weight = 1 - decay_at(int(num_updates), decay)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema), [c.detach().float() for c in current], weight)

    ema = AveragedModel(model, multi_avg_fn=move).float()
    return ema.requires_grad_(False)
