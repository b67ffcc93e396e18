"""Step-wise sampling: one image's denoising state, and one batched U-Net call over many of them.

A `Trajectory` owns all that its image depends on: scheduler, random generator, step count, guidance
and condition. `denoise_step` moves any mix of trajectories on by one step each with one U-Net call.
So images may join and leave between steps, and none depends on what it was batched with.

Shape suffixes: C, H, W a latent's channels, rows and columns; B images; N rows of a U-Net call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning, concat
from ldm.errors import UserError
from ldm.feature_reuse import predict_reusing
from ldm.objective import NoiseSchedule
from ldm.schedulers import SCHEDULERS, add_noise, go_on, history, start
from ldm.unet import predict

__all__ = ["MAX_SEED", "MAX_STEPS", "SCHEDULERS", "Trajectory", "denoise_step", "sample"]

MAX_STEPS = 1000
MAX_SEED = 2**63 - 1


@dataclass(eq=False, kw_only=True)
class Trajectory:
    """One image on its way from noise to a clean latent.

    ``shape``: (C, H, W) of the latent. ``scheduler``: a key of `SCHEDULERS`. ``scheduler_config``:
    the checkpoint's diffusers scheduler config. ``num_inference_steps``: 1 to 1000. ``guidance``:
    scale s >= 0 of classifier-free guidance; 1 is plain conditional sampling, at half the cost.
    ``seed``: 0 to 2**63 - 1, the source of all the image's randomness (torch's CPU generator tells
    seeds apart by their lowest 32 bits). ``condition``, ``null``: one row each; ``null`` is needed
    unless guidance is 1. ``device``: where the latent lives.

    ``noise``: (C, H, W), what it begins with; the seed's own standard normal noise unless given.
    ``x0``, ``first_step``: begin at that step, with ``x0`` noised to its level (SDEdit: Meng et al.
    2022, algorithm 1); at the number of steps it is ``x0`` itself, and done.

    ``mask``: bool (H, W); where it is False the latent is kept at ``x0``, at the noise level of every step
    and with the noise that the seed began with (RePaint: Lugmayr et al. 2022, algorithm 1 with U = 1).

    ``refresh_every``: run the whole U-Net at every step that is a multiple of it, and in between only what
    is shallow (`ldm.feature_reuse`): faster, and another image; 1 is none of that.

    ``latent``: float32 (C, H, W), in the scheduler's own scale until ``done``; ``step_index``: steps
    taken so far.

    Raises UserError for a user's choice that is not allowed, ValueError for a condition that does
    not have one row.
    """

    shape: tuple[int, int, int]
    scheduler: str
    scheduler_config: Mapping[str, object]
    num_inference_steps: int
    guidance: float
    seed: int
    condition: Conditioning = field(default_factory=Conditioning)
    null: Conditioning | None = None
    device: torch.device | str = "cpu"
    noise: Tensor | None = None
    x0: Tensor | None = None
    first_step: int = 0
    mask: Tensor | None = None
    refresh_every: int = 1
    latent: Tensor = field(init=False, repr=False)
    step_index: int = field(init=False, default=0)
    _noise: Tensor = field(init=False, repr=False)
    # Of its rows of a U-Net call, the conditional and the unconditional one.
    _deep: list[Tensor] = field(init=False, repr=False, default_factory=list)
    # What `denoised` follows from: input, prediction and timestep of the last step.
    _last_step: tuple[Tensor, Tensor, Tensor] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        _check_choices(self.num_inference_steps, self.guidance, self.seed)
        _check_conditions(self.condition, self.null, self.guidance)
        self._scheduler = start(
            self.scheduler, self.scheduler_config, self.num_inference_steps, self.first_step
        )
        self._variance_exploding = SCHEDULERS[self.scheduler].variance_exploding
        # A generator on the CPU draws the same noise for every device.
        self._generator = torch.Generator().manual_seed(self.seed)
        # Drawn whether or not it is used: the noise of the steps comes after it.
        drawn_CHW = torch.randn(self.shape, generator=self._generator)
        self._noise = (drawn_CHW if self.noise is None else self.noise).to(self.device)
        self._begin(self._noise)
        self._keep_known()

    def _begin(self, noise_CHW: Tensor) -> None:
        self.step_index = self.first_step
        if self.first_step:
            if self.x0 is None or not 0 < self.first_step <= self.num_steps:
                raise ValueError(f"step {self.first_step} of {self.num_steps} needs an x0 to begin with")
            self.latent = self.noised(self.x0.to(self.device), noise_CHW)
        elif self._variance_exploding:
            self.latent = noise_CHW * self._scheduler.init_noise_sigma
        else:
            self.latent = noise_CHW

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return len(self._scheduler.timesteps)

    @property
    def done(self) -> bool:
        return self.step_index >= self.num_steps

    @property
    def progress(self) -> float:
        """Share of the steps that are taken, 0 to 1."""
        return self.step_index / self.num_steps

    @property
    def guided(self) -> bool:
        """Whether a step needs the unconditional prediction too."""
        return self.guidance != 1.0

    @property
    def timestep(self) -> Tensor:
        """The timestep that the next prediction is for: 0-dim, CPU. Raises ValueError when done."""
        if self.done:
            raise ValueError(f"all {self.num_steps} steps are taken")
        return self._scheduler.timesteps[self.step_index]

    def model_input(self) -> Tensor:
        """What the U-Net is to see next: float32 (C, H, W)."""
        if not self._variance_exploding:
            return self.latent
        return self._scheduler.scale_model_input(self.latent, self.timestep)

    @property
    def denoised(self) -> Tensor:
        """The clean latent (C, H, W) that the last prediction implies. ValueError before the first step."""
        if self._last_step is None:
            raise ValueError("no step was taken yet")
        x_CHW, prediction_CHW, timestep = self._last_step
        schedule = NoiseSchedule.from_scheduler_config(self.scheduler_config)
        # Some samplers visit timesteps between those of a DDPM.
        t_1 = timestep[None] if schedule.kind == "flow" else timestep[None].round().long()
        return schedule.to_x0(x_CHW[None], prediction_CHW[None], t_1)[0]

    @property
    def reusable(self) -> list[Tensor | None]:
        """For each of its rows of the next call: a deep feature in place of the deep blocks, or None."""
        num_rows = 2 if self.guided else 1
        is_due = (self.step_index - self.first_step) % self.refresh_every == 0
        return [None] * num_rows if is_due or not self._deep else list(self._deep)

    def keep(self, deep: Sequence[Tensor]) -> None:
        """The deep feature of each of its rows."""
        self._deep = list(deep)

    def noised(self, x0_CHW: Tensor, noise_CHW: Tensor) -> Tensor:
        """``x0`` as noisy as ``latent`` is now, in the scheduler's own scale; ``x0`` itself when done."""
        if self.done:
            return x0_CHW
        return add_noise(self._scheduler, x0_CHW, noise_CHW, self.timestep)

    def advance(self, prediction_CHW: Tensor) -> None:
        """Take one step along ``prediction_CHW``, of the latent's shape, guidance already applied."""
        if prediction_CHW.shape != self.latent.shape:
            raise ValueError(
                f"prediction {tuple(prediction_CHW.shape)} for a latent {tuple(self.latent.shape)}"
            )
        self._last_step = (self.model_input(), prediction_CHW, self.timestep)
        # With a batch dimension, which diffusers' schedulers expect.
        previous_1CHW, *_ = self._scheduler.step(
            prediction_CHW[None],
            self.timestep,
            self.latent[None],
            generator=self._generator,
            return_dict=False,
        )
        self.latent = previous_1CHW[0]
        self.step_index += 1
        self._keep_known()

    def _keep_known(self) -> None:
        if self.mask is None:
            return
        if self.x0 is None or self.mask.dtype != torch.bool or self.mask.shape != self.latent.shape[1:]:
            raise ValueError(f"mask {self.mask.dtype} {tuple(self.mask.shape)}, latent {self.shape}")
        known_CHW = self.noised(self.x0.to(self.device), self._noise)
        self.latent = torch.where(self.mask.to(self.device), self.latent, known_CHW)

    def state(self) -> dict[str, Tensor]:
        """All that the coming steps depend on beside the arguments, on the CPU."""
        remembered = history(self._scheduler)
        return {
            "latent": self.latent.cpu(),
            "step_index": torch.tensor(self.step_index),
            "generator": self._generator.get_state(),
            **{f"remembered_{index}": output[0].cpu() for index, output in enumerate(remembered)},
            **{f"deep_{index}": deep_CHW.cpu() for index, deep_CHW in enumerate(self._deep)},
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the `state` of a trajectory with the same arguments; only before the first step."""
        self.latent = state["latent"].to(self.device)
        self.step_index = int(state["step_index"])
        self._generator.set_state(state["generator"])
        go_on(self._scheduler, self.step_index, [each[None] for each in self._numbered(state, "remembered")])
        self.keep(self._numbered(state, "deep"))

    def _numbered(self, state: Mapping[str, Tensor], kind: str) -> list[Tensor]:
        names = sorted(name for name in state if name.startswith(f"{kind}_"))
        return [state[name].to(self.device) for name in names]


@torch.no_grad()
def denoise_step(unet: nn.Module, trajectories: Sequence[Trajectory]) -> None:
    """Advance every trajectory by one step, with one U-Net call for all.

    They may be at different steps and have different schedulers, guidance and conditions; latent
    shapes and the kind of condition must agree. The call has a row for each trajectory, and a
    second, unconditional one for each that is guided. Raises ValueError if one is done, UserError for one
    that reuses features of a U-Net that cannot be cut.
    """
    guided = [index for index, trajectory in enumerate(trajectories) if trajectory.guided]
    rows = [*range(len(trajectories)), *guided]
    inputs = [trajectory.model_input() for trajectory in trajectories]
    timesteps = [trajectory.timestep.float() for trajectory in trajectories]
    conditions = [trajectory.condition for trajectory in trajectories]
    nulls = [t.null for t in trajectories if t.guided and t.null is not None]
    call = (
        torch.stack([inputs[index] for index in rows]),
        torch.stack([timesteps[index] for index in rows]),
        concat(conditions + nulls),
    )
    if any(trajectory.refresh_every > 1 for trajectory in trajectories):
        prediction_NCHW = _predict_reusing(unet, *call, trajectories, guided)
    else:
        prediction_NCHW = predict(unet, *call)
    predictions = list(prediction_NCHW[: len(trajectories)])
    for index, unconditional_CHW in zip(guided, prediction_NCHW[len(trajectories) :], strict=True):
        predictions[index] = _guide(predictions[index], unconditional_CHW, trajectories[index].guidance)
    for trajectory, prediction_CHW in zip(trajectories, predictions, strict=True):
        trajectory.advance(prediction_CHW)


def _predict_reusing(
    unet: nn.Module,
    x_NCHW: Tensor,
    timestep_N: Tensor,
    conditioning: Conditioning,
    trajectories: Sequence[Trajectory],
    guided: Sequence[int],
) -> Tensor:
    """`predict`, with what each trajectory can reuse, and for each what it can reuse next."""
    deep = [trajectory.reusable for trajectory in trajectories]
    deep_N = [rows[0] for rows in deep] + [deep[index][1] for index in guided]
    prediction_NCHW, found_N = predict_reusing(unet, x_NCHW, timestep_N, conditioning, deep_N)
    unconditional = dict(zip(guided, found_N[len(trajectories) :], strict=True))
    for index, trajectory in enumerate(trajectories):
        second = [unconditional[index]] if index in unconditional else []
        trajectory.keep([found_N[index], *second])
    return prediction_NCHW


def sample(unet: nn.Module, trajectories: Sequence[Trajectory], batch_size: int) -> Tensor:
    """Run all to the end, at most ``batch_size`` at a time: float32 (B, C, H, W), in their order.

    One that ends makes room for the next at once, so mixed step counts keep the batch full.
    """
    if batch_size < 1 or not trajectories:
        raise ValueError(f"need trajectories and a batch size, got {len(trajectories)} and {batch_size}")
    unfinished = [trajectory for trajectory in trajectories if not trajectory.done]
    while unfinished:
        denoise_step(unet, unfinished[:batch_size])
        unfinished = [trajectory for trajectory in unfinished if not trajectory.done]
    return torch.stack([trajectory.latent for trajectory in trajectories])


def _guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, whose w is our scale minus 1)."""
    return unconditional + guidance * (conditional - unconditional)


def _check_choices(num_steps: int, guidance: float, seed: int) -> None:
    if not 1 <= num_steps <= MAX_STEPS:
        raise UserError(f"{num_steps} inference steps", allowed=f"1 to {MAX_STEPS}")
    if not math.isfinite(guidance) or guidance < 0:
        raise UserError(f"guidance {guidance}", allowed="a number from 0 on; 1 is no guidance")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed {seed}", allowed=f"0 to {MAX_SEED}")


def _check_conditions(condition: Conditioning, null: Conditioning | None, guidance: float) -> None:
    if condition.num_rows not in (None, 1):
        raise ValueError(f"a trajectory has one condition, got {condition.num_rows}")
    if guidance == 1.0:
        return
    if condition.num_rows is None:
        raise UserError(f"guidance {guidance} for a model without conditions", allowed="1")
    if null is None or null.num_rows != 1:
        raise ValueError("a guidance other than 1 needs the null condition, one row")
