"""What fp16 cannot hold, and order within a unit of images of several sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.autoencoder import load
from ldm.errors import BadSampleError
from ldm.image_tensors import to_model
from pipelines.encode.encoder import encode_images, stored_moments


@pytest.mark.parametrize(
    ("mean", "std", "reason"),
    [
        (float("nan"), 1.0, "non_finite_latent"),
        (0.0, float("nan"), "non_finite_latent"),
        (float("-inf"), 1.0, "non_finite_latent"),
        (-65536.0, 1.0, "latent_overflow"),
        (0.0, 1e6, "latent_overflow"),
    ],
)
def test_what_fp16_cannot_hold_is_rejected(mean: float, std: float, reason: str) -> None:
    means, stds = torch.zeros(2, 3, 3), torch.ones(2, 3, 3)
    means[1, 2, 0], stds[0, 1, 1] = mean, std
    with pytest.raises(BadSampleError) as caught:
        stored_moments(means, stds)
    assert caught.value.reason == reason


def test_the_largest_fp16_is_kept() -> None:
    mean, std = stored_moments(torch.full((1, 1, 1), -65504.0), torch.zeros(1, 1, 1))
    assert (mean.dtype, mean.item(), std.item()) == (np.float16, -65504.0, 0.0)


def test_images_of_two_sizes_come_back_in_order(vae_folder: Path) -> None:
    autoencoder = load(vae_folder)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (size, 16, 3), dtype=np.uint8) for size in (16, 32, 16, 32, 16)]
    for image, (mean, std) in zip(images, encode_images(autoencoder, images, 2), strict=True):
        alone = autoencoder.encode(to_model(image[None]))
        torch.testing.assert_close(mean, alone.mean_BChw[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(std, alone.std_BChw[0], rtol=1e-5, atol=1e-5)
