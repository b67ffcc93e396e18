from itertools import product

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ldm import unet as unets
from ldm.conditioning import ClassConditioner, Conditioning
from ldm.errors import UserError
from ldm.objective import NoiseSchedule, Prediction
from ldm.sampling import MAX_SEED, SCHEDULERS, Trajectory, denoise_step, sample
from ldm.schedulers import start

# diffusers 0.42 converts its sigmas in a way that numpy 2 will stop to accept.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

SHAPE = (4, 8, 8)
CLASSES = ClassConditioner(["a", "b", "c"])
DDPM_SCHEDULERS = [name for name, row in SCHEDULERS.items() if row.kind == "ddpm"]
# The first step counts, and the last, for which diffusers' trailing spacing has a step too many.
SURPLUS_STEPS = (61, 103, 998)


def config_for(scheduler: str, prediction: Prediction = "v_prediction") -> dict[str, object]:
    """v by default: with random weights it keeps the latent near unit variance, as a trained model does.

    A random epsilon is magnified by 1 / alpha = 15 in the first step, and rounding errors with it.
    """
    if scheduler == "flow_euler":
        prediction = "flow"
    return NoiseSchedule(prediction=prediction).scheduler_config()


def trajectory(
    scheduler: str, *, steps: int = 4, guidance: float = 1.0, seed: int = 0, label: int = 0, **options: object
) -> Trajectory:
    settings: dict[str, object] = {
        "shape": SHAPE,
        "scheduler": scheduler,
        "scheduler_config": config_for(scheduler),
        "num_inference_steps": steps,
        "guidance": guidance,
        "seed": seed,
        "condition": CLASSES.encode([label]),
        "null": CLASSES.null,
    }
    return Trajectory(**(settings | options))  # type: ignore[arg-type]


class Recorder(nn.Module):
    """Stands in for a U-Net: predicts a constant per class label, and notes what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.labels: list[list[int]] = []
        self.timesteps: list[list[float]] = []

    def forward(
        self, x: Tensor, timestep: Tensor, *, class_labels: Tensor, return_dict: bool, **_: object
    ) -> tuple[Tensor]:
        self.labels.append(class_labels.tolist())
        self.timesteps.append(timestep.tolist())
        return (torch.ones_like(x) * self.scale * class_labels.view(-1, 1, 1, 1),)


class Oracle(nn.Module):
    """The perfect U-Net for a data set of one picture: the prediction that points to ``x0``."""

    def __init__(self, schedule: NoiseSchedule, x0: Tensor) -> None:
        super().__init__()
        self.schedule = schedule
        self.x0 = nn.Parameter(x0)

    def forward(self, x: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        t = timestep.long() if self.schedule.kind == "ddpm" else timestep
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in self.schedule.coefficients(t))
        noise = (x - alpha * self.x0) / sigma
        return (self.schedule.target(self.x0.expand_as(x), noise, t),)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    tiny: nn.Module = unets.build("tiny", in_channels=4, num_classes=3, sample_size=8)
    return tiny.eval()


def mixed(prediction: Prediction) -> list[Trajectory]:
    """Eight trajectories that differ in everything that may differ within a batch."""
    schedulers = ["flow_euler"] if prediction == "flow" else DDPM_SCHEDULERS
    return [
        trajectory(
            schedulers[index % len(schedulers)],
            steps=2 + index % 5,
            guidance=(1.0, 3.0, 0.0, 1.5)[(index // 2) % 4],
            seed=100 + index,
            label=index % 3,
            scheduler_config=NoiseSchedule(prediction=prediction).scheduler_config(),
        )
        for index in range(8)
    ]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_an_image_does_not_depend_on_its_batch(unet: nn.Module, prediction: Prediction) -> None:
    together = sample(unet, mixed(prediction), batch_size=8)
    by_three = sample(unet, mixed(prediction), batch_size=3)
    alone = torch.cat([sample(unet, [one], batch_size=1) for one in mixed(prediction)])
    # 1e-5 of a latent's unit variance; an untrained epsilon leaves it far larger (see config_for).
    tolerance = 1e-5 * max(1.0, alone.std().item())
    assert (together - alone).abs().max() <= tolerance
    assert (by_three - alone).abs().max() <= tolerance


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_seed_is_all_the_randomness(unet: nn.Module, scheduler: str) -> None:
    first, again, other = (
        sample(unet, [trajectory(scheduler, seed=seed)], batch_size=1) for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def plain_loop(
    unet: nn.Module, scheduler: str, steps: int, guidance: float, config: dict[str, object]
) -> Tensor:
    """Sampling as diffusers' own pipelines do it."""
    row = SCHEDULERS[scheduler]
    solver = getattr(diffusers, row.diffusers_class).from_config(config, **row.overrides)
    solver.set_timesteps(steps)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, *SHAPE, generator=generator) * getattr(solver, "init_noise_sigma", 1.0)
    for t in solver.timesteps:
        model_input = solver.scale_model_input(x, t) if hasattr(solver, "scale_model_input") else x
        conditional, unconditional = (
            unet(model_input, t, encoder_hidden_states=None, class_labels=torch.tensor([label])).sample
            for label in (2, 3)
        )
        prediction = unconditional + guidance * (conditional - unconditional)
        x = solver.step(prediction, t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize(("scheduler", "guidance"), [*product(SCHEDULERS, (1.0, 4.0))])
@torch.no_grad()
def test_stepping_equals_the_plain_diffusers_loop(unet: nn.Module, scheduler: str, guidance: float) -> None:
    one = trajectory(scheduler, steps=6, guidance=guidance, seed=5, label=2)
    expected = plain_loop(unet, scheduler, 6, guidance, config_for(scheduler))
    torch.testing.assert_close(sample(unet, [one], batch_size=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", DDPM_SCHEDULERS)
@torch.no_grad()
def test_a_stable_diffusion_scheduler_config_is_followed(unet: nn.Module, scheduler: str) -> None:
    config: dict[str, object] = {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    one = trajectory(scheduler, steps=5, guidance=2.0, seed=5, label=2, scheduler_config=config)
    expected = plain_loop(unet, scheduler, 5, 2.0, config)
    torch.testing.assert_close(sample(unet, [one], batch_size=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "prediction", "steps"),
    [
        *product(DDPM_SCHEDULERS, ("epsilon", "v_prediction"), (1, 10, 50, 61)),
        *product(["flow_euler"], ["flow"], (1, 10, 50, 61)),
    ],
)
def test_a_perfect_prediction_leads_to_x0(scheduler: str, prediction: Prediction, steps: int) -> None:
    schedule = NoiseSchedule(prediction=prediction)
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    one = trajectory(scheduler, steps=steps, scheduler_config=schedule.scheduler_config(), seed=3)
    result = sample(Oracle(schedule, x0), [one], batch_size=1)[0]
    # fp32 rounding of x_t, magnified by 1 / alpha = 15 at the noisy end.
    assert (result - x0).abs().max() <= 5e-5


@pytest.mark.parametrize("scheduler", DDPM_SCHEDULERS)
def test_latents_are_not_clipped_like_pictures(scheduler: str) -> None:
    schedule = NoiseSchedule(prediction="v_prediction")
    config = schedule.scheduler_config() | {"clip_sample": True, "thresholding": True}
    x0 = torch.linspace(-5, 5, 256).view(SHAPE)
    one = trajectory(scheduler, steps=5, scheduler_config=config)
    assert (sample(Oracle(schedule, x0), [one], batch_size=1)[0] - x0).abs().max() <= 5e-5


@pytest.mark.parametrize(("scheduler", "steps"), [*product(SCHEDULERS, (1, 2, 999, 1000, *SURPLUS_STEPS))])
def test_every_step_count_has_its_falling_timesteps(scheduler: str, steps: int) -> None:
    started = start(scheduler, config_for(scheduler), steps)
    assert len(started.timesteps) == steps
    assert (started.timesteps.diff() < 0).all()
    assert started.timesteps[-1] >= 0
    assert started.timesteps[0] == (1000 if scheduler == "flow_euler" else 999)


def test_diffusers_still_has_the_surplus_step() -> None:
    # When this fails, diffusers has mended it: delete _drop_surplus_step.
    solver = diffusers.DDIMScheduler.from_config(config_for("ddim"))
    solver.set_timesteps(SURPLUS_STEPS[0])
    assert solver.timesteps[-2:].tolist() == [15, -1]


@pytest.mark.parametrize(
    ("scheduler", "config", "steps"),
    [
        # 1000 // 1001 = 0: all timesteps would be one.
        ("dpmpp", {"timestep_spacing": "leading"}, 1000),
        # One past the last alpha_bar.
        ("ddim", {"timestep_spacing": "leading", "steps_offset": 1}, 1000),
        ("ddpm", {"num_train_timesteps": 100}, 101),
        ("euler", {"timestep_spacing": "spiral"}, 10),
    ],
)
def test_a_step_count_that_the_config_cannot_have_is_told(
    scheduler: str, config: dict[str, object], steps: int
) -> None:
    with pytest.raises(UserError, match=f"'{scheduler}' cannot take {steps} steps"):
        trajectory(scheduler, steps=steps, scheduler_config={"_class_name": "DDPMScheduler", **config})


def test_one_call_holds_a_second_row_for_the_guided_only() -> None:
    recorder = Recorder()
    batch = [
        trajectory("ddim", label=0, guidance=1.0),
        trajectory("euler", label=1, guidance=3.0, steps=2),
        trajectory("dpmpp", label=2, guidance=0.0, steps=1),
    ]
    denoise_step(recorder, batch)
    assert recorder.labels == [[0, 1, 2, 3, 3]]
    assert recorder.timesteps == [[999, 999, 999, 999, 999]]
    denoise_step(recorder, batch[:2])
    assert recorder.labels[1] == [0, 1, 3]
    assert recorder.timesteps[1] == [749, 499, 499]


def test_guidance_is_the_formula_of_the_paper() -> None:
    # The recorder predicts 0.2 for class 2 and 0.3 for null: 0.3 + 4 (0.2 - 0.3) = -0.1.
    guided, by_hand = trajectory("ddim", label=2, guidance=4.0), trajectory("ddim", label=2)
    denoise_step(Recorder(), [guided])
    by_hand.advance(torch.full(SHAPE, -0.1))
    torch.testing.assert_close(guided.latent, by_hand.latent)


def test_a_batch_is_refilled_as_soon_as_one_ends() -> None:
    recorder = Recorder()
    batch = [trajectory("ddim", label=label, steps=steps) for label, steps in enumerate((1, 3, 2))]
    assert sample(recorder, batch, batch_size=2).shape == (3, *SHAPE)
    assert recorder.labels == [[0, 1], [1, 2], [1, 2]]


def test_progress_runs_from_nothing_to_done() -> None:
    one = trajectory("euler", steps=2)
    seen = [(one.progress, one.done)]
    while not one.done:
        denoise_step(Recorder(), [one])
        seen.append((one.progress, one.done))
    assert seen == [(0.0, False), (0.5, False), (1.0, True)]
    with pytest.raises(ValueError, match="all 2 steps are taken"):
        denoise_step(Recorder(), [one])


def test_a_failed_call_leaves_every_trajectory_where_it_was() -> None:
    ready, finished = trajectory("ddim"), trajectory("ddim", steps=1)
    denoise_step(Recorder(), [finished])
    before = ready.latent.clone()
    with pytest.raises(ValueError, match="steps are taken"):
        denoise_step(Recorder(), [ready, finished])
    assert ready.step_index == 0
    assert torch.equal(ready.latent, before)


def test_an_unconditional_model_is_sampled_without_conditions() -> None:
    torch.manual_seed(0)
    unet = unets.build("tiny", in_channels=4, num_classes=None, sample_size=8).eval()
    batch = [trajectory("ddim", condition=Conditioning(), null=None, seed=seed) for seed in (1, 2)]
    assert sample(unet, batch, batch_size=2).isfinite().all()


def test_a_scheduler_of_another_kind_of_model_is_told() -> None:
    with pytest.raises(UserError, match="'ddim' cannot sample a flow model; allowed: flow_euler"):
        trajectory("ddim", scheduler_config=config_for("flow_euler"))
    with pytest.raises(UserError, match="cannot sample a ddpm model; allowed: ddim, ddpm, euler, dpmpp"):
        trajectory("flow_euler", scheduler_config=config_for("ddim"))
    with pytest.raises(UserError, match="unknown scheduler 'lms'; allowed: flow_euler"):
        trajectory("lms", scheduler_config=config_for("flow_euler"))


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"steps": 0}, "0 inference steps; allowed: 1 to 1000"),
        ({"steps": 1001}, "1001 inference steps"),
        ({"guidance": -0.1}, "guidance -0.1"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"guidance": float("inf")}, "guidance inf"),
        ({"seed": -1}, "seed -1"),
        ({"seed": MAX_SEED + 1}, "seed 9223372036854775808"),
        ({"guidance": 2.0, "condition": Conditioning()}, "guidance 2.0 for a model without conditions"),
    ],
)
def test_a_choice_out_of_range_is_told(choice: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        trajectory("ddim", **choice)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"condition": CLASSES.encode([0, 1])}, {"guidance": 2.0, "null": None}])
def test_conditions_must_have_one_row(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"one row|one condition"):
        trajectory("ddim", **wrong)  # type: ignore[arg-type]


def test_the_largest_seed_is_taken() -> None:
    assert trajectory("ddim", seed=MAX_SEED).latent.isfinite().all()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_given_noise_takes_the_place_of_the_seeds(unet: nn.Module, scheduler: str) -> None:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    given, own = trajectory(scheduler, seed=3, noise=noise), trajectory(scheduler, seed=3)
    assert torch.equal(given.latent, own.latent)
    assert torch.equal(sample(unet, [given], 1), sample(unet, [own], 1))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_beginning_after_the_last_step_is_x0(scheduler: str) -> None:
    x0 = torch.ones(SHAPE)
    one = trajectory(scheduler, steps=4, x0=x0, first_step=4)
    assert one.done and one.progress == 1.0
    assert torch.equal(one.latent, x0)


@pytest.mark.parametrize("wrong", [{"first_step": 1}, {"first_step": 5, "x0": torch.ones(SHAPE)}])
def test_a_later_beginning_needs_an_x0_and_a_step(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="needs an x0"):
        trajectory("ddim", steps=4, **wrong)  # type: ignore[arg-type]


def test_a_prediction_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction"):
        trajectory("ddim").advance(torch.zeros(4, 8, 1))


def test_sampling_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="need trajectories"):
        sample(Recorder(), [], batch_size=1)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_features_are_reused_by_each_at_its_own_steps_whatever_the_company(
    unet: nn.Module, guidance: float
) -> None:
    """Rows of the deep blocks are counted: in 4 of 10 steps at every third, in all without reuse."""
    rows: list[int] = []
    counting = unet.mid_block.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))  # type: ignore[union-attr,operator]
    try:
        reusing = {"steps": 10, "guidance": guidance, "refresh_every": 3}
        alone = sample(unet, [trajectory("ddim", seed=5, **reusing)], batch_size=1)  # type: ignore[arg-type]
        per_step = 2 if guidance != 1.0 else 1
        assert sum(rows) == 4 * per_step
        company = [trajectory("ddim", seed=1, steps=7), trajectory("ddim", seed=5, **reusing)]  # type: ignore[arg-type]
        rows.clear()
        # One has taken two steps when the other comes.
        for _ in range(2):
            denoise_step(unet, company[:1])
        together = sample(unet, company, batch_size=2)
        assert sum(rows) == 7 + 4 * per_step
    finally:
        counting.remove()
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-4)
    plain = sample(unet, [trajectory("ddim", seed=5, steps=10, guidance=guidance)], batch_size=1)
    assert not torch.allclose(plain, alone, rtol=1e-4, atol=1e-4)


def test_one_that_reuses_features_goes_on_from_its_state(unet: nn.Module) -> None:
    options = {"steps": 7, "guidance": 2.0, "refresh_every": 4}
    whole, first = (trajectory("dpmpp", **options) for _ in range(2))  # type: ignore[arg-type]
    sample(unet, [whole], batch_size=1)
    for _ in range(3):
        denoise_step(unet, [first])
    second = trajectory("dpmpp", **options)  # type: ignore[arg-type]
    second.restore(first.state())
    assert torch.equal(sample(unet, [second], batch_size=1)[0], whole.latent)


@pytest.mark.parametrize(("scheduler", "prediction"), [("ddim", "epsilon"), ("euler", "v_prediction")])
def test_the_clean_latent_that_a_perfect_prediction_implies_is_the_clean_latent(
    scheduler: str, prediction: Prediction
) -> None:
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    config = config_for(scheduler, prediction)
    moving = trajectory(scheduler, scheduler_config=config, x0=x0, first_step=2, steps=8)
    with pytest.raises(ValueError, match="no step"):
        _ = moving.denoised
    schedule = NoiseSchedule.from_scheduler_config(config)
    timestep = moving.timestep.round().long()[None]
    alpha, sigma = schedule.coefficients(timestep, torch.float32)
    noise = (moving.model_input() - alpha * x0) / sigma
    moving.advance(noise if prediction == "epsilon" else alpha * noise - sigma * x0)
    torch.testing.assert_close(moving.denoised, x0, rtol=1e-3, atol=1e-3)
