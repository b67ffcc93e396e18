"""The linear preview: exact where the decoder is linear, and of one pixel a latent."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.autoencoder import Autoencoder, load
from ldm.image_tensors import from_model, to_model
from ldm.preview import LatentPreview

MAP = torch.tensor([[0.1, 0.2, -0.1], [0.05, -0.1, 0.1], [0.1, 0.0, 0.02], [0.0, 0.1, 0.05]])
SHIFT = torch.tensor([0.1, -0.2, 0.0])


class LinearDecoder:
    """Every latent becomes 2×2 pixels: its linear colour, and detail whose mean is 0."""

    f = 2

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def decode(self, latent_BChw: Tensor) -> Tensor:
        self.sizes.append(tuple(latent_BChw.shape[2:]))
        image = torch.einsum("bchw,cr->brhw", latent_BChw, MAP) + SHIFT.view(3, 1, 1)
        detail = torch.tensor([[0.1, -0.1], [-0.1, 0.1]]).repeat(latent_BChw.shape[2:])
        return image.repeat_interleave(2, 2).repeat_interleave(2, 3) + detail


def latents(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)


def smooth_picture(autoencoder: Autoencoder) -> tuple[Tensor, np.ndarray]:
    """The latent (4, 16, 16) of a picture, and the colours (16, 16, 3) under each of it."""
    rows, columns = np.mgrid[0:128, 0:128] / 128
    picture = (np.stack([rows, columns, 1 - rows], -1) * 200 + 20).astype(np.uint8)
    latent = autoencoder.encode(to_model(picture[None])).mode()[0]
    return latent, picture.reshape(16, 8, 16, 8, 3).mean((1, 3))


@pytest.mark.parametrize("shape", [(4, 40, 70), (4, 9, 9), (4, 100, 3)])
def test_a_linear_decoder_is_found(shape: tuple[int, ...]) -> None:
    decoder = LinearDecoder()
    fitted_on = latents(*shape)
    preview = LatentPreview.fit(decoder, fitted_on)  # type: ignore[arg-type]
    assert all(max(size) <= 16 for size in decoder.sizes) and len(decoder.sizes) <= 4
    other = latents(4, 12, 20)
    expected = torch.einsum("chw,cr->rhw", other, MAP) + SHIFT.view(3, 1, 1)
    made = preview(other).astype(int)
    assert made.shape == (12, 20, 3)
    # Rounding of a value that lies between two levels may fall to either side.
    assert np.abs(made - from_model(expected[None])[0].astype(int)).max() <= 1


def test_one_latent_is_enough_to_see_its_colour() -> None:
    decoder, one = LinearDecoder(), latents(4, 1, 1)
    expected = (one[:, 0, 0] @ MAP + SHIFT).add(1).mul(127.5)
    made = LatentPreview.fit(decoder, one)(one)[0, 0]  # type: ignore[arg-type]
    np.testing.assert_allclose(made, expected, atol=0.51)


def test_of_the_default_vae_on_a_smooth_picture() -> None:
    autoencoder = load("f8")
    latent, small = smooth_picture(autoencoder)
    difference = LatentPreview.fit(autoencoder, latent)(latent) - small
    assert np.sqrt((difference**2).mean()) < 4


def test_without_a_latent_the_picture_can_still_be_seen() -> None:
    """Whatever it was fitted to: colours of a picture are far nearer than they are to one grey (57)."""
    autoencoder = load("f8")
    latent, small = smooth_picture(autoencoder)
    preview = LatentPreview.fit_to_any(autoencoder, autoencoder.whitening)
    assert np.sqrt(((preview(latent) - small) ** 2).mean()) < 15
    assert np.array_equal(LatentPreview(preview.map_D3)(latent), preview(latent))
