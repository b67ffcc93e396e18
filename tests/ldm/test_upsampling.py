"""The input of an upsampler against diffusers' DDPMScheduler and plain repetition."""

import pytest
import torch
from diffusers import DDPMScheduler

from ldm.upsampling import NUM_NOISE_LEVELS, noise_levels, upsampler_input


def test_the_low_latent_is_noised_then_repeated_behind_the_noisy_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(3, 4, 8, 12, generator=generator)
    low, noise = torch.randn(2, 3, 4, 2, 3, generator=generator)
    level = torch.tensor([0, 20, 999])
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    augmented = scheduler.add_noise(low, noise, level)
    made = upsampler_input(x_t, low, noise, level)
    assert made.shape == (3, 8, 8, 12)
    assert torch.equal(made[:, :4], x_t)
    assert torch.equal(made[:, 4:], augmented.repeat_interleave(4, 2).repeat_interleave(4, 3))


@pytest.mark.parametrize("shape", [(9, 12), (8, 11), (8, 9), (1, 2)])
def test_only_a_whole_multiple_has_a_low_latent(shape: tuple[int, int]) -> None:
    low = torch.zeros(1, 4, 2, 3)
    with pytest.raises(ValueError, match="is no whole multiple of the low-resolution 2×3"):
        upsampler_input(torch.zeros(1, 4, *shape), low, low, torch.tensor([0]))


def test_levels_are_uniform_and_whole() -> None:
    u = torch.tensor([0.0, 0.25, 0.2501, 0.9999, 1 - 2**-24])
    assert noise_levels(u, 3).tolist() == [0, 1, 1, 3, 3]
    assert noise_levels(u, NUM_NOISE_LEVELS - 1)[-1] == 999
    assert noise_levels(u, 0).tolist() == [0] * 5
    assert noise_levels((torch.arange(4 * 351) + 0.5) / (4 * 351), 350).bincount().tolist() == [4] * 351
