"""Exponential moving average of a model's weights."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["Decay", "averaged", "constant_decay", "power_decay", "share_frozen"]

# From the number of updates so far, at least 1, to the share of the average that is kept.
Decay: TypeAlias = Callable[[int], float]


def constant_decay(decay: float) -> Decay:
    """min(decay, (1 + n) / (10 + n)): short memory at first, so that the random start is forgotten."""
    return lambda num_updates: min(decay, (1 + num_updates) / (10 + num_updates))


def power_decay(width: float) -> Decay:
    """(1 - 1/n)^(gamma + 1): the profile grows with the run (Karras et al. 2024, eq. 123 and 127).

    width: standard deviation of the profile as a share of the run, between 0 and 0.28; the paper's sigma_rel.
    """
    exponent = _power_exponent(width)
    return lambda num_updates: (1 - 1 / (num_updates + 1)) ** (exponent + 1)


def averaged(model: nn.Module, decay: Decay) -> AveragedModel:
    """A copy of ``model`` in fp32 whose ``update_parameters(model)`` moves it by one EMA step.

    ``.module`` is the averaged model, in evaluation mode, ready to be saved; the first update copies.
    Buffers are copied from the model, not averaged.
    """

    def move(ema: Sequence[Tensor], current: Sequence[Tensor], num_updates: Any) -> None:
        weight = 1 - decay(int(num_updates))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema), [c.detach().float() for c in current], weight)

    ema = AveragedModel(model, multi_avg_fn=move).float()
    return ema.requires_grad_(False).eval()


def share_frozen(ema: AveragedModel, model: nn.Module) -> None:
    """Let the average have the memory of those weights of ``model`` that are not trained."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    ema.module.load_state_dict(frozen, strict=False, assign=True)


def _power_exponent(width: float) -> float:
    """gamma with width² = (gamma + 1) / ((gamma + 2)² (gamma + 3)) (Karras et al. 2024, eq. 126)."""
    import numpy as np

    inverse = width**-2
    # The largest real root of gamma³ + 7 gamma² + (16 - 1/width²) gamma + (12 - 1/width²).
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())
