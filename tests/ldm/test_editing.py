"""SDEdit and inpainting with every scheduler, against plain loops over diffusers' schedulers."""

from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

from ldm import unet as unets
from ldm.checkpoint import read_info
from ldm.denoiser import DenoiseOptions, Denoiser
from ldm.editing import first_step, inpaint, latent_mask, sdedit
from ldm.errors import UserError
from ldm.schedulers import SCHEDULERS

# diffusers 0.42 converts its sigmas in a way that numpy 2 will stop to accept.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

STEPS, SEED = 4, 5
Z = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 + 1
MASK = torch.zeros(8, 8, dtype=torch.bool)
MASK[2:5, 3:] = True
# Of the fixture's checkpoints, written out again: the whitening is part of what is tested.
SHIFT = torch.tensor([0.5, -0.5, 0.0]).view(3, 1, 1)
SCALE = torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1)


@pytest.fixture(scope="module")
def denoisers(checkpoint_folders: dict[str, Path]) -> dict[str, Denoiser]:
    """scheduler → a denoiser that it can sample."""
    by_kind = {
        "ddpm": Denoiser.load(checkpoint_folders["v_prediction"]),
        "flow": Denoiser.load(checkpoint_folders["flow"]),
    }
    return {name: by_kind[row.kind] for name, row in SCHEDULERS.items()}


def options(scheduler: str, **changes: object) -> DenoiseOptions:
    settings = {"steps": STEPS, "scheduler": scheduler, "seed": SEED, "class_name": "dog", "guidance": 2.0}
    return DenoiseOptions.model_validate(settings | changes)


def plain_loop(denoiser: Denoiser, scheduler: str, begin: int, mask: Tensor | None = None) -> Tensor:
    """Noise Z to step ``begin`` and denoise, by formulas for the noise level of each kind of scheduler."""
    row = SCHEDULERS[scheduler]
    solver = getattr(diffusers, row.diffusers_class).from_config(denoiser.scheduler_config, **row.overrides)
    solver.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(3, 8, 8, generator=generator)
    x0 = (Z - SHIFT) / SCALE

    def noised(step: int) -> Tensor:
        if scheduler == "euler":
            return x0 + solver.sigmas[step] * noise
        if scheduler == "flow_euler":
            sigma = solver.timesteps[step] / 1000
            return (1 - sigma) * x0 + sigma * noise
        alpha_bar = solver.alphas_cumprod[solver.timesteps[step]]
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    pure = noise * (solver.init_noise_sigma if scheduler == "euler" else 1.0)
    x = noised(begin) if begin else pure
    for step, t in list(enumerate(solver.timesteps))[begin:]:
        if mask is not None:
            x = mask * x + ~mask * noised(step)
        inputs = solver.scale_model_input(x, t) if scheduler == "euler" else x
        with torch.no_grad():
            dog, null = (
                denoiser.unet(
                    inputs[None], t, encoder_hidden_states=None, class_labels=torch.tensor([label])
                ).sample
                for label in (1, 2)
            )
        x = solver.step(null + 2.0 * (dog - null), t, x[None], generator=generator).prev_sample[0]
    return x * SCALE + SHIFT


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sdedit_equals_the_plain_loop(denoisers: dict[str, Denoiser], scheduler: str) -> None:
    denoiser = denoisers[scheduler]
    z, strengths = torch.stack([Z, Z, Z, Z, -Z]), [0.0, 0.26, 0.5, 1.0, 1.0]
    edited = sdedit(denoiser, z, strengths, options(scheduler))
    assert torch.equal(edited[0], Z)  # bit for bit: nothing was done
    for b, begin in ((1, 3), (2, 2), (3, 0), (4, 0)):  # at strength 1 the input is not looked at
        torch.testing.assert_close(edited[b], plain_loop(denoiser, scheduler, begin), rtol=0, atol=2e-5)


def test_an_edit_does_not_depend_on_its_batch(denoisers: dict[str, Denoiser]) -> None:
    z = torch.stack([Z, -Z, Z + 1])
    together = sdedit(denoisers["ddim"], z, [0.5, 1.0, 0.3], options("ddim"))
    by_two = sdedit(denoisers["ddim"], z, [0.5, 1.0, 0.3], options("ddim", batch_size=2))
    torch.testing.assert_close(together, by_two, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_equals_the_plain_loop_and_keeps_what_is_known(
    denoisers: dict[str, Denoiser], scheduler: str, strength: float
) -> None:
    denoiser = denoisers[scheduler]
    painted = inpaint(denoiser, Z, MASK, [SEED], options(scheduler), strength)[0]
    expected = plain_loop(denoiser, scheduler, {0.5: 2, 1.0: 0}[strength], MASK)
    assert torch.equal(painted[:, ~MASK], Z[:, ~MASK])
    torch.testing.assert_close(painted[:, MASK], expected[:, MASK], rtol=0, atol=2e-5)
    assert (painted - Z)[:, MASK].abs().max() > 0.1


def test_seeds_paint_differently_and_alone_as_in_a_batch(denoisers: dict[str, Denoiser]) -> None:
    together = inpaint(denoisers["ddpm"], Z, MASK, [SEED, 7], options("ddpm"))
    assert (together[0] - together[1])[:, MASK].abs().max() > 0.1
    one_by_one = inpaint(denoisers["ddpm"], Z, MASK, [SEED, 7], options("ddpm", batch_size=1))
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=2e-5)


def test_inpainting_without_a_step_or_a_mask_is_the_input(denoisers: dict[str, Denoiser]) -> None:
    nothing = torch.zeros(8, 8, dtype=torch.bool)
    assert torch.equal(inpaint(denoisers["euler"], Z, nothing, [1], options("euler"))[0], Z)
    unmoved = inpaint(denoisers["euler"], Z, MASK, [1], options("euler"), strength=0.0)[0]
    torch.testing.assert_close(unmoved, Z)


@pytest.mark.parametrize("strength", [-0.01, 1.01, float("nan")])
def test_a_strength_out_of_range_is_told(strength: float) -> None:
    with pytest.raises(UserError, match=r"strength .*; allowed: 0"):
        first_step(strength, 10)


def test_strength_is_the_share_of_steps_that_are_taken() -> None:
    assert [first_step(s, 50) for s in (0, 0.02, 0.29, 0.5, 1)] == [50, 49, 36, 25, 0]


def test_no_masked_pixel_is_lost_at_latent_resolution() -> None:
    mask = torch.zeros(16, 24, dtype=torch.bool)
    mask[0, 0] = mask[15, 23] = mask[7, 8] = True
    expected = [[True, True, False], [False, False, True]]
    assert latent_mask(mask, 8).tolist() == expected


def test_a_mask_of_another_size_is_refused(denoisers: dict[str, Denoiser]) -> None:
    with pytest.raises(ValueError, match="mask"):
        inpaint(denoisers["ddim"], Z, MASK[:4], [1], options("ddim"))


def test_a_latent_that_the_unet_cannot_take_is_told(denoisers: dict[str, Denoiser]) -> None:
    for z in (Z[:2], Z[:, :6]):
        with pytest.raises(
            UserError, match=r"cannot denoise a latent of shape .*allowed: \(3, height, width\)"
        ):
            sdedit(denoisers["ddim"], z[None], [0.5], options("ddim"))


@pytest.mark.parametrize("width", [None, 8])
def test_a_model_without_classes_is_denoised_without_a_condition(
    denoisers: dict[str, Denoiser], width: int | None
) -> None:
    unet = unets.build("tiny", in_channels=3, num_classes=None, sample_size=8, cross_attention_dim=width)
    info = denoisers["ddim"].info.model_copy(update={"class_names": None, "embedding_width": width})
    denoiser = Denoiser(unet.eval(), info, denoisers["ddim"].scheduler_config)
    assert sdedit(denoiser, Z[None], [0.5], options("ddim", class_name=None)).isfinite().all()
    with pytest.raises(UserError, match="for a model without classes"):
        sdedit(denoiser, Z[None], [0.5], options("ddim"))


def test_an_upsampler_is_told(checkpoint_folders: dict[str, Path], tmp_path: Path) -> None:
    info = read_info(checkpoint_folders["flow"]).model_copy(update={"upsampling_factor": 2})
    (tmp_path / "ldm.json").write_text(info.model_dump_json())
    with pytest.raises(UserError, match="is an upsampler"):
        Denoiser.load(tmp_path)


def test_a_class_that_is_unknown_is_told(denoisers: dict[str, Denoiser]) -> None:
    with pytest.raises(UserError, match=r"unknown class 'dgo'.*did you mean 'dog'"):
        sdedit(denoisers["ddim"], Z[None], [0.5], options("ddim", class_name="dgo"))
