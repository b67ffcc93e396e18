import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ldm.errors import UserError
from ldm.objective import BetaSchedule, NoiseSchedule, Prediction, diffusion_loss, kind_of, min_snr_weight

BETA_SCHEDULES: tuple[BetaSchedule, ...] = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "flow")
GRID = [*range(0, 1000, 37), 999]


def timesteps(schedule: NoiseSchedule) -> torch.Tensor:
    return torch.tensor(GRID) if schedule.kind == "ddpm" else torch.tensor(GRID) + 0.5


def images(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, len(GRID), 4, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x0, noise


def recovered(schedule: NoiseSchedule, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x0, noise = images(dtype)
    t = timesteps(schedule)
    x_t = schedule.add_noise(x0, noise, t)
    return x0, schedule.to_x0(x_t, schedule.target(x0, noise, t), t)


def alpha_bar_oracle(schedule: BetaSchedule, start: float, end: float) -> np.ndarray:
    """alpha_bar from the papers' formulas, in fp64: Ho et al. 2020; Nichol & Dhariwal 2021, eq. 17."""
    if schedule == "squaredcos_cap_v2":
        f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    elif schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, 1000) ** 2
    else:
        betas = np.linspace(start, end, 1000)
    return np.cumprod(1 - betas)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_recovers_the_same_x0(prediction: Prediction) -> None:
    x0, x0_again = recovered(NoiseSchedule(prediction=prediction), torch.float32)
    assert (x0_again - x0).abs().max() <= 1e-5


@pytest.mark.parametrize(("prediction", "beta_schedule"), [*product(PREDICTIONS, BETA_SCHEDULES)])
def test_recovery_is_exact_in_fp64(prediction: Prediction, beta_schedule: BetaSchedule) -> None:
    x0, x0_again = recovered(NoiseSchedule(prediction=prediction, beta_schedule=beta_schedule), torch.float64)
    assert (x0_again - x0).abs().max() <= 1e-10


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_v_recovers_x0_in_fp32_however_noisy(beta_schedule: BetaSchedule) -> None:
    x0, x0_again = recovered(
        NoiseSchedule(prediction="v_prediction", beta_schedule=beta_schedule), torch.float32
    )
    assert (x0_again - x0).abs().max() <= 1e-5


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_epsilon_in_fp32_loses_only_what_x_t_has_lost(beta_schedule: BetaSchedule) -> None:
    # x_t holds alpha x0 to fp32 rounding; solving for x0 magnifies that by 1 / alpha.
    schedule = NoiseSchedule(prediction="epsilon", beta_schedule=beta_schedule)
    x0, x0_again = recovered(schedule, torch.float32)
    alpha_B, _ = schedule.coefficients(timesteps(schedule))
    assert ((x0_again - x0).abs().amax((1, 2, 3)) * alpha_B).max() <= 1e-6


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_alpha_bar_is_the_papers(beta_schedule: BetaSchedule) -> None:
    schedule = NoiseSchedule(prediction="epsilon", beta_schedule=beta_schedule)
    oracle = alpha_bar_oracle(beta_schedule, schedule.beta_start, schedule.beta_end)
    # A product of 1000 fp32 factors: relative error up to about 1000 roundings of 6e-8, less where
    # the cosine's last betas near 1 leave few digits of 1 - beta.
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), oracle, rtol=2e-4)


@pytest.mark.parametrize(
    ("scheduler_class", "prediction", "dtype"),
    [*product((DDPMScheduler, DDIMScheduler), ("epsilon", "v_prediction"), (torch.float32, torch.float64))],
)
def test_noise_and_velocity_are_diffusers_own(
    scheduler_class: type[DDPMScheduler] | type[DDIMScheduler], prediction: Prediction, dtype: torch.dtype
) -> None:
    schedule = NoiseSchedule(prediction=prediction)
    scheduler = scheduler_class.from_config(schedule.scheduler_config())
    x0, noise = images(dtype)
    t = timesteps(schedule)
    assert torch.equal(schedule.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t))
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    assert torch.equal(schedule.target(x0, noise, t), expected)


def test_flow_noise_is_diffusers_own_and_its_target_the_slope() -> None:
    schedule = NoiseSchedule(prediction="flow")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(schedule.scheduler_config())
    x0, noise = images(torch.float32)
    t = torch.tensor(GRID).float() + 1
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, scheduler.scale_noise(x0, t, noise), rtol=0, atol=1e-6)
    # The path is straight: one Euler step of any length along the target stays on it.
    later = schedule.add_noise(x0, noise, t / 2)
    slope = schedule.target(x0, noise, t)
    step = (t / 2 - t).view(-1, 1, 1, 1) / 1000
    torch.testing.assert_close(x_t + step * slope, later, rtol=0, atol=1e-6)


def test_half_precision_samples_are_noised_in_fp32() -> None:
    schedule = NoiseSchedule(prediction="v_prediction")
    x0, noise = images(torch.float16)
    t = timesteps(schedule)
    assert torch.equal(schedule.add_noise(x0, noise, t), schedule.add_noise(x0.float(), noise.float(), t))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_schedule_survives_its_scheduler_config(prediction: Prediction) -> None:
    schedule = NoiseSchedule(prediction=prediction, num_train_timesteps=500)
    if prediction != "flow":
        schedule = replace(schedule, beta_start=1e-3, beta_end=0.03, beta_schedule="squaredcos_cap_v2")
    assert NoiseSchedule.from_scheduler_config(schedule.scheduler_config()) == schedule
    assert kind_of(schedule.scheduler_config()) == schedule.kind


def test_a_stable_diffusion_config_is_understood() -> None:
    config = {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "skip_prk_steps": True,
        "trained_betas": None,
    }
    assert NoiseSchedule.from_scheduler_config(config) == NoiseSchedule(prediction="v_prediction")


def test_keys_left_out_of_a_config_mean_diffusers_defaults() -> None:
    schedule = NoiseSchedule.from_scheduler_config({"_class_name": "DDPMScheduler"})
    assert torch.equal(schedule.alphas_cumprod, DDPMScheduler().alphas_cumprod)


@pytest.mark.parametrize(
    "config",
    [
        {"trained_betas": [0.1, 0.2]},
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "sample"},
        {"rescale_betas_zero_snr": True},
        {"beta_start": "small"},
    ],
)
def test_a_config_that_cannot_be_trained_is_a_user_error(config: dict[str, object]) -> None:
    with pytest.raises(UserError):
        NoiseSchedule.from_scheduler_config(config)


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    schedule = NoiseSchedule(prediction="v_prediction", rescale_betas_zero_snr=True)
    last = torch.tensor([999])
    assert schedule.snr(last).item() == 0
    assert min_snr_weight(schedule, last).item() == 0
    x0, noise = images(torch.float32)
    assert torch.equal(schedule.add_noise(x0[:1], noise[:1], last), noise[:1])


@pytest.mark.parametrize(
    ("prediction", "snr", "expected"),
    [
        # gamma = 5. epsilon: min(snr, 5) / snr. v: min(snr, 5) / (snr + 1).
        ("epsilon", 20.0, 0.25),
        ("epsilon", 5.0, 1.0),
        ("epsilon", 0.5, 1.0),
        ("v_prediction", 19.0, 0.25),
        ("v_prediction", 4.0, 0.8),
        ("v_prediction", 0.25, 0.2),
    ],
)
def test_min_snr_by_hand(prediction: Prediction, snr: float, expected: float) -> None:
    # One training timestep whose alpha_bar = snr / (snr + 1), hence beta = 1 / (snr + 1).
    beta = 1 / (snr + 1)
    schedule = NoiseSchedule(
        prediction=prediction, num_train_timesteps=1, beta_start=beta, beta_end=beta, beta_schedule="linear"
    )
    t = torch.tensor([0])
    assert schedule.snr(t).item() == pytest.approx(snr, rel=1e-5)
    assert min_snr_weight(schedule, t, gamma=5.0).item() == pytest.approx(expected, rel=1e-5)


def test_min_snr_of_a_flow_by_hand() -> None:
    # sigma 0.5: snr 1, weight 1/4. sigma 0.2: snr 16, weight 5/25. sigma 1 and 0: weight 0.
    schedule = NoiseSchedule(prediction="flow")
    weight = min_snr_weight(schedule, torch.tensor([500.0, 200.0, 1000.0, 0.0]), gamma=5.0)
    torch.testing.assert_close(weight, torch.tensor([0.25, 0.2, 0.0, 0.0]))


def test_ddpm_timesteps_are_uniform_and_whole() -> None:
    schedule = NoiseSchedule(prediction="epsilon")
    u = torch.tensor([0.0, 0.0009, 0.001, 0.5, 0.9999, 1 - 2**-24])
    drawn = schedule.timesteps(u)
    assert drawn.dtype == torch.int64
    assert drawn.tolist() == [0, 0, 1, 500, 999, 999]


def test_flow_timesteps_are_the_quantiles_asked_for() -> None:
    schedule = NoiseSchedule(prediction="flow")
    u = torch.tensor([0.0, 0.25, 0.5])
    assert schedule.timesteps(u).tolist() == [0, 250, 500]
    # Phi(1) = 0.841345, so that u is one standard deviation up: sigmoid(0.3 + 2 * 1).
    drawn = schedule.timesteps(torch.tensor([0.0, 0.5, 0.841344746]), logit_normal=(0.3, 2.0))
    expected = [0.0, 1000 / (1 + math.exp(-0.3)), 1000 / (1 + math.exp(-2.3))]
    assert drawn.tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="logit-normal"):
        NoiseSchedule(prediction="epsilon").timesteps(u, logit_normal=(0.0, 1.0))


def test_the_loss_is_a_mean_for_each_sample_times_its_weight() -> None:
    prediction = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    target = torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]]])
    assert diffusion_loss(prediction, target).tolist() == [5.0, 2.0]
    assert diffusion_loss(prediction, target, torch.tensor([0.5, 3.0])).tolist() == [2.5, 6.0]
    with pytest.raises(ValueError, match="beside target"):
        diffusion_loss(prediction, target[:1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"prediction": "sample"},
        {"prediction": "epsilon", "beta_schedule": "sigmoid"},
        {"prediction": "epsilon", "beta_start": 0.5, "beta_end": 0.1},
        {"prediction": "epsilon", "num_train_timesteps": 0},
        {"prediction": "epsilon", "rescale_betas_zero_snr": True},
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"not one of|need"):
        NoiseSchedule(**wrong)  # type: ignore[arg-type]
