import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pad

from ldm.autoencoder import PRESETS, Autoencoder, build
from ldm.metrics import psnr
from ldm.resampler_start import START_LOGVAR, start_as_resampler

NAMES = [name for name, preset in PRESETS.items() if preset.norm_num_groups == 1]
SIZE = 64


def picture() -> Tensor:
    """A smooth colour picture (1, 3, 64, 64) in [-0.8, 0.8]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="ij")
    return 0.8 * torch.stack([torch.sin(5 * x + 2 * y), torch.cos(4 * y - x), 2 * x * y - 1])[None]


def built(name: str) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(build(name))


def decibels(a: Tensor, b: Tensor) -> float:
    return float(psnr((a + 1) / 2, (b + 1) / 2))


def magnified(image: Tensor) -> Tensor:
    """Twice as large: every pixel repeated, then a tent of 3 × 3."""
    tent = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    repeated = pad(interpolate(image, scale_factor=2, mode="nearest"), (1, 1, 1, 1))
    return conv2d(repeated, tent.expand(3, 1, 3, 3), groups=3)


@pytest.mark.parametrize("name", NAMES)
def test_the_latent_is_a_small_copy_of_the_picture(name: str) -> None:
    vae = built(name)
    moments = vae.encode(picture())
    # Not exact: GroupNorm's statistics depend a little on the picture. Measured: 0.024.
    assert (moments.mean_BChw[:, :3] - avg_pool2d(picture(), vae.f)).abs().max() < 0.05
    expected_std = torch.tensor(START_LOGVAR / 2).exp()
    torch.testing.assert_close(moments.std_BChw, expected_std.expand_as(moments.std_BChw), rtol=0.3, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_reconstruction_is_the_resampled_picture(name: str) -> None:
    vae = built(name)
    decoded = vae.decode(vae.encode(picture()).mode())
    resampled = avg_pool2d(picture(), vae.f)
    for _ in range(vae.f.bit_length() - 1):
        resampled = magnified(resampled)
    # Measured: 37.7, 35.8 and 37.5 dB.
    assert decibels(decoded, resampled.clamp(-1, 1)) > 33


def test_the_usual_random_start_is_far_worse() -> None:
    torch.manual_seed(0)
    vae = built("f8")
    usual = Autoencoder(AutoencoderKL.from_config(vae.vae.config))
    started, random = (decibels(v.decode(v.encode(picture()).mode()), picture()) for v in (vae, usual))
    # Measured: 23.5 and 10.3 dB.
    assert started > random + 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [-0.5, 0.0, 0.5])
def test_a_constant_stays_one(name: str, level: float) -> None:
    vae = built(name)
    size = 6 * vae.f
    decoded = vae.decode(vae.encode(torch.full((1, 3, size, size), level)).mode())
    # Away from the border, where zero padding mixes in grey.
    middle = decoded[..., 2 * vae.f : -2 * vae.f, 2 * vae.f : -2 * vae.f]
    assert (middle - level).abs().max() < 0.2
    assert middle.std(dim=(2, 3)).max() < 0.02


def test_training_moves_what_the_start_left_out() -> None:
    torch.manual_seed(0)
    vae = build("f4").train()
    x = picture()[..., :32, :32]
    loss = (vae.decode(vae.encode(x).latent_dist.mean).sample - x).square().mean()
    loss.backward()
    zeros = [module.weight for name, module in vae.named_modules() if name.endswith("conv2")]
    assert zeros
    assert not any(weight.any() for weight in zeros)
    assert all(weight.grad is not None and weight.grad.any() for weight in zeros)


@pytest.mark.parametrize(("latent_channels", "widths"), [(2, (8, 8)), (4, (8,))])
def test_a_layout_that_cannot_carry_colours_is_refused(latent_channels: int, widths: tuple[int, ...]) -> None:
    vae = AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=1,
    )
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    with pytest.raises(ValueError, match="3 latent channels and 2 resolutions"):
        start_as_resampler(vae)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
