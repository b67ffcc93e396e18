"""Noise schedules, prediction targets and loss weights of diffusion training.

Every process here is Gaussian, ``x_t = alpha(t) x0 + sigma(t) noise``, and every prediction target
is a linear mix of ``x0`` and ``noise``. So one pair of coefficients carries all the formulas:

    kind   alpha                sigma                    predicts
    ddpm   sqrt(alpha_bar_t)    sqrt(1 - alpha_bar_t)    epsilon or v_prediction
    flow   1 - sigma            t / num_train_timesteps  flow

(ddpm: Ho et al. 2020, eq. 4; flow: Liu et al. 2022, eq. 1, and Lipman et al. 2023, eq. 22 with
sigma_min = 0, time running from data to noise.) A timestep ``t`` is what the U-Net is given: whole
numbers in [0, num_train_timesteps) for ddpm, real ones in [0, num_train_timesteps] for flow, as in
diffusers, whose schedulers do the sampling.

Shape suffixes: B samples. ``x0``, ``noise``, ``x_t`` and predictions are float (B, ...) of one shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.errors import UserError

__all__ = [
    "BetaSchedule",
    "Kind",
    "NoiseSchedule",
    "Prediction",
    "diffusion_loss",
    "kind_of",
    "min_snr_weight",
]

Kind = Literal["ddpm", "flow"]
Prediction = Literal["epsilon", "v_prediction", "flow"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# What a scheduler_config.json means by leaving a key out; not our own defaults.
DIFFUSERS_DEFAULTS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """How noise grows with the timestep, and what the U-Net predicts.

    ``beta_*`` and ``rescale_betas_zero_snr`` mean what they mean in a diffusers scheduler's config,
    and only for kind "ddpm"; their defaults are Stable Diffusion's. ``rescale_betas_zero_snr``
    makes the last timestep pure noise (Lin et al. 2023, algorithm 1).

    Raises ValueError for a value that is not allowed, or a kind and prediction that do not go together.
    """

    prediction: Prediction
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"prediction {self.prediction!r} is not one of {get_args(Prediction)}")
        if self.beta_schedule not in get_args(BetaSchedule):
            raise ValueError(f"beta_schedule {self.beta_schedule!r} is not one of {get_args(BetaSchedule)}")
        if self.num_train_timesteps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError("need num_train_timesteps >= 1 and 0 < beta_start <= beta_end < 1")
        if self.rescale_betas_zero_snr and self.prediction == "epsilon":
            # At pure noise epsilon is the input itself, and x0 cannot be computed from it.
            raise ValueError("rescale_betas_zero_snr needs v_prediction: epsilon says nothing at zero SNR")

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, object]) -> NoiseSchedule:
        """The schedule that a diffusers ``scheduler_config.json`` describes.

        Raises UserError for one that trains in a way not supported here.
        """
        if config.get("trained_betas") is not None:
            raise UserError(
                "a noise schedule with trained_betas is not supported", do="give beta_start and beta_end"
            )
        known = {field.name for field in fields(cls)} - {"prediction"}
        given = {name: config[name] for name in known if name in config}
        if kind_of(config) == "flow":
            prediction: object = "flow"
        else:
            prediction = config.get("prediction_type", "epsilon")
            given = DIFFUSERS_DEFAULTS | given
        try:
            # Values come from a file: __post_init__ checks the ones a type checker cannot.
            return cls(prediction=prediction, **given)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise UserError(f"noise schedule cannot be used: {error}") from error

    @property
    def kind(self) -> Kind:
        return "flow" if self.prediction == "flow" else "ddpm"

    def scheduler_config(self) -> dict[str, object]:
        """The config of the diffusers scheduler that samples what this schedule trains.

        Saved as ``scheduler/scheduler_config.json`` it is read by diffusers' own pipelines.
        """
        if self.kind == "flow":
            return {
                "_class_name": FLOW_SCHEDULER,
                "num_train_timesteps": self.num_train_timesteps,
                "shift": 1.0,
            }
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.num_train_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "rescale_betas_zero_snr": self.rescale_betas_zero_snr,
            "prediction_type": self.prediction,
            # A latent is not a picture in [-1, 1]: clipping would cut its tails off.
            "clip_sample": False,
            # The only spacing that begins at the noise level of pure noise (Lin et al. 2023, 3.3).
            "timestep_spacing": "trailing",
        }

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha_bar (num_train_timesteps,), float32, CPU: diffusers' own, so training and sampling agree."""
        if self.kind == "flow":
            raise ValueError("a flow has no alpha_bar")
        return _alphas_cumprod(self)

    def coefficients(self, t_B: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``(alpha_B, sigma_B)`` at timesteps ``t_B``, on its device."""
        if self.kind == "flow":
            sigma_B = t_B.to(dtype) / self.num_train_timesteps
            return 1 - sigma_B, sigma_B
        alpha_bar_B = self.alphas_cumprod.to(device=t_B.device, dtype=dtype)[t_B]
        return alpha_bar_B**0.5, (1 - alpha_bar_B) ** 0.5

    def snr(self, t_B: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, float32 (B,); infinite at flow's t = 0."""
        alpha_B, sigma_B = self.coefficients(t_B)
        return (alpha_B / sigma_B) ** 2

    def timesteps(self, u_B: Tensor, *, logit_normal: tuple[float, float] | None = None) -> Tensor:
        """Timesteps (B,) from ``u_B``, uniform in [0, 1): int64 for ddpm, float32 for flow.

        ``logit_normal=(mean, std)`` draws the flow's sigma as sigmoid of a normal instead of
        uniformly, which favours the middle of the path (Esser et al. 2024, eq. 19).
        """
        if self.kind == "ddpm":
            if logit_normal is not None:
                raise ValueError("logit-normal timesteps are for flow")
            return (u_B * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)
        sigma_B = u_B.float()
        if logit_normal is not None:
            mean, std = logit_normal
            sigma_B = torch.sigmoid(mean + std * torch.special.ndtri(sigma_B))
        return sigma_B * self.num_train_timesteps

    def add_noise(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """``x_t = alpha x0 + sigma noise``."""
        alpha, sigma = self._coefficients_like(x0, t_B)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """What the U-Net should predict at ``x_t``.

        epsilon: noise (Ho et al. 2020, eq. 14). v_prediction: alpha noise - sigma x0 (Salimans &
        Ho 2022, section 4). flow: noise - x0, the constant velocity dx/dsigma (Liu et al. 2022, eq. 1).
        """
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - x0
        alpha, sigma = self._coefficients_like(x0, t_B)
        return alpha * noise - sigma * x0

    def to_x0(self, x_t: Tensor, prediction: Tensor, t_B: Tensor) -> Tensor:
        """The clean sample that ``prediction`` implies at ``x_t``: `target` solved for x0."""
        alpha, sigma = self._coefficients_like(x_t, t_B)
        if self.prediction == "epsilon":
            return (x_t - sigma * prediction) / alpha
        if self.prediction == "flow":
            return x_t - sigma * prediction
        return alpha * x_t - sigma * prediction

    def _coefficients_like(self, x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        # Half precision cannot hold 1 - alpha_bar near t = 0: compute in at least fp32.
        alpha_B, sigma_B = self.coefficients(t_B, torch.promote_types(x.dtype, torch.float32))
        shape = (-1,) + (1,) * (x.ndim - 1)
        return alpha_B.view(shape), sigma_B.view(shape)


@lru_cache(maxsize=16)
def _alphas_cumprod(schedule: NoiseSchedule) -> Tensor:
    # Every trajectory has a schedule of its own, and this takes longer than a step of a small U-Net.
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(schedule.scheduler_config())
    assert isinstance(scheduler.alphas_cumprod, Tensor)
    return scheduler.alphas_cumprod


def kind_of(scheduler_config: Mapping[str, object]) -> Kind:
    """Whether a diffusers scheduler's config belongs to a flow or to a ddpm-family model."""
    name = str(scheduler_config.get("_class_name", ""))
    is_flow = name.startswith("FlowMatch") or scheduler_config.get("prediction_type") == "flow_prediction"
    return "flow" if is_flow else "ddpm"


def min_snr_weight(schedule: NoiseSchedule, t_B: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR-gamma loss weights (Hang et al. 2023, section 3.4), float32 (B,).

    The paper weighs the error *of x0* by ``min(SNR, gamma)``. An error of the prediction is one of
    x0 times ``d x0 / d prediction``, so the weight on the prediction's squared error is

        epsilon:       min(SNR, gamma) sigma^2 / alpha^2 = min(SNR, gamma) / SNR
        v_prediction:  min(SNR, gamma) sigma^2           = min(SNR, gamma) / (SNR + 1)
        flow:          min(SNR, gamma) sigma^2           (the same argument; not in the paper)
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    alpha_B, sigma_B = schedule.coefficients(t_B)
    x0_per_prediction_B = sigma_B / alpha_B if schedule.prediction == "epsilon" else sigma_B
    return schedule.snr(t_B).clamp(max=gamma) * x0_per_prediction_B**2


def diffusion_loss(prediction: Tensor, target: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, float32 (B,), times ``weight_B`` if given.

    Without a weight it is the "simple" objective of Ho et al. 2020, eq. 14. The caller averages
    over the batch (and over workers).
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} beside target {tuple(target.shape)}")
    loss_B = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return loss_B if weight_B is None else weight_B * loss_B
