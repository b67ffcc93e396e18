"""The samplers on offer, and how one is started from a checkpoint's scheduler config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.objective import Kind, kind_of

__all__ = [
    "SCHEDULERS",
    "Scheduler",
    "SchedulerRow",
    "add_noise",
    "default_scheduler",
    "go_on",
    "history",
    "start",
]


@dataclass(frozen=True, kw_only=True)
class SchedulerRow:
    """A sampler: its diffusers class, the kind of model it samples, and settings that it insists on.

    ``variance_exploding``: its latent is ``x0 + sigma noise``, so it starts at the largest sigma,
    and is scaled down before the U-Net sees it.
    """

    diffusers_class: str
    kind: Kind
    overrides: Mapping[str, object] = field(default_factory=dict)
    variance_exploding: bool = False


SCHEDULERS: Mapping[str, SchedulerRow] = {
    # Song et al. 2021, eq. 12 with eta = 0. diffusers clips to [-1, 1] unless told otherwise: right
    # for pictures, wrong for latents.
    "ddim": SchedulerRow(
        diffusers_class="DDIMScheduler",
        kind="ddpm",
        overrides={"clip_sample": False, "thresholding": False},
    ),
    # Ho et al. 2020, algorithm 2.
    "ddpm": SchedulerRow(
        diffusers_class="DDPMScheduler",
        kind="ddpm",
        overrides={"clip_sample": False, "thresholding": False},
    ),
    # Karras et al. 2022, algorithm 1 without the second-order correction.
    "euler": SchedulerRow(diffusers_class="EulerDiscreteScheduler", kind="ddpm", variance_exploding=True),
    # Lu et al. 2022, DPM-Solver++(2M), algorithm 2.
    "dpmpp": SchedulerRow(
        diffusers_class="DPMSolverMultistepScheduler",
        kind="ddpm",
        overrides={"algorithm_type": "dpmsolver++", "solver_order": 2, "thresholding": False},
    ),
    # Liu et al. 2022, section 2: Euler steps along the learned velocity.
    "flow_euler": SchedulerRow(diffusers_class="FlowMatchEulerDiscreteScheduler", kind="flow"),
}


def default_scheduler(kind: Kind) -> str:
    """The key of `SCHEDULERS` for a user who names none."""
    return "flow_euler" if kind == "flow" else "ddim"


class Scheduler(Protocol):
    """What is used of a diffusers scheduler: its timesteps, falling, the forward process, and one step.

    The last two members exist only where `SchedulerRow.variance_exploding`.
    """

    timesteps: Tensor

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        *,
        generator: torch.Generator,
        return_dict: bool,
    ) -> tuple[Tensor, ...]: ...

    @property
    def init_noise_sigma(self) -> Tensor | float: ...

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...


def start(
    name: str, scheduler_config: Mapping[str, object], num_steps: int, first_step: int = 0
) -> Scheduler:
    """A fresh scheduler with ``num_steps`` timesteps set, for one image whose first step is ``first_step``.

    ``scheduler_config``: the checkpoint's own, of any diffusers scheduler of the same kind. Raises
    UserError for a scheduler that is unknown or of another kind, and for a step count that this
    config cannot have.
    """
    ready = _ready(name, json.dumps(dict(scheduler_config), sort_keys=True), num_steps)
    started = copy(ready)
    for attribute, value in vars(ready).items():
        # What a multistep solver remembers; tensors are replaced by diffusers, and never changed.
        if isinstance(value, list):
            setattr(started, attribute, list(value))
    if hasattr(started, "set_begin_index"):
        started.set_begin_index(first_step)
    return started


@lru_cache(maxsize=256)
def _ready(name: str, scheduler_config: str, num_steps: int) -> Scheduler:
    """Before its first step. Making one takes diffusers as long as a step of a small U-Net."""
    import diffusers

    config = json.loads(scheduler_config)
    row = _row(name, config)
    scheduler = getattr(diffusers, row.diffusers_class).from_config(config, **row.overrides)
    refusal = UserError(
        f"scheduler {name!r} cannot take {num_steps} steps with this checkpoint's scheduler config",
        do="ask for fewer steps, or set timestep_spacing to 'trailing' in that config",
    )
    try:
        scheduler.set_timesteps(num_steps)
    except ValueError as error:
        raise refusal from error
    _drop_surplus_step(scheduler, num_steps)
    if row.kind == "ddpm" and scheduler.timesteps[0] >= scheduler.config["num_train_timesteps"]:
        raise refusal
    # Between two equal noise levels a multistep solver divides by zero.
    if (torch.diff(getattr(scheduler, "sigmas", scheduler.timesteps)) >= 0).any():
        raise refusal
    ready: Scheduler = scheduler
    return ready


def add_noise(scheduler: Scheduler, x0_CHW: Tensor, noise_CHW: Tensor, timestep: Tensor) -> Tensor:
    """``x0`` at the noise level of the next step, whose timestep is given: what `step` takes, (C, H, W)."""
    if hasattr(scheduler, "scale_noise"):  # the name that flows have for it
        noised: Tensor = scheduler.scale_noise(x0_CHW[None], timestep[None], noise_CHW[None])[0]
        return noised
    return scheduler.add_noise(x0_CHW[None], noise_CHW[None], timestep[None])[0]


def history(scheduler: Scheduler) -> list[Tensor]:
    """What a multistep solver remembers of earlier steps, oldest first; nothing for the others."""
    return [output for output in getattr(scheduler, "model_outputs", ()) if output is not None]


def go_on(scheduler: Scheduler, step_index: int, remembered: Sequence[Tensor]) -> None:
    """Put a fresh scheduler where another stood after ``step_index`` steps, with its `history`."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(step_index)
    if remembered:
        outputs: list[Tensor | None] = scheduler.model_outputs  # type: ignore[attr-defined]
        outputs[-len(remembered) :] = remembered
        scheduler.lower_order_nums = min(step_index, len(outputs))  # type: ignore[attr-defined]


def _row(name: str, scheduler_config: Mapping[str, object]) -> SchedulerRow:
    kind = kind_of(scheduler_config)
    fitting = ", ".join(key for key, row in SCHEDULERS.items() if row.kind == kind)
    if name not in SCHEDULERS:
        raise UserError(f"unknown scheduler {name!r}", allowed=fitting)
    if SCHEDULERS[name].kind != kind:
        raise UserError(f"scheduler {name!r} cannot sample a {kind} model", allowed=fitting)
    return SCHEDULERS[name]


def _drop_surplus_step(scheduler: Scheduler, num_steps: int) -> None:
    """Undo a rounding error in diffusers' "trailing" spacing.

    Its float ``arange`` yields one timestep too many, -1, for 64 of the step counts up to 1000 (61
    is the first): a last step that takes the almost clean latent for pure noise.
    """
    if len(scheduler.timesteps) <= num_steps:
        return
    scheduler.timesteps = scheduler.timesteps[:num_steps]
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.cat([scheduler.sigmas[:num_steps], scheduler.sigmas[-1:]])
