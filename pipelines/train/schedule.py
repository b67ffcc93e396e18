"""Learning-rate schedules."""

import math

__all__ = ["lr_factor"]


def lr_factor(step: int, num_steps: int | None, warmup_steps: int, floor: float = 0.01) -> float:
    """Linear warm-up, then a half cosine down to ``floor``; a factor of the peak learning rate.

    step counts from 0; num_steps None keeps the peak (Loshchilov & Hutter 2017, without restarts).
    """
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    if num_steps is None:
        return warmup
    progress = min(1.0, step / max(1, num_steps))
    return warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
