import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from ldm.metrics import MS_SSIM_MIN_PX, nearest_label_share, psnr, reconstruction_quality
from ldm.structural_similarity import ssim, ssim_and_ms_ssim


def smooth(size: int, num_images: int = 2) -> Tensor:
    """Images in [-1, 1] with structure at several scales."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        interpolate(torch.randn(num_images, 3, side, side, generator=generator), (size, size), mode="bicubic")
        for side in (4, 12, 30)
    ]
    return torch.stack(layers).sum(0).mul(0.3).clamp(-1, 1)


def blurred(image: Tensor) -> Tensor:
    return avg_pool2d(image, 5, stride=1, padding=2, count_include_pad=False)


def eight_bits(image_3HW: Tensor) -> Tensor:
    """[-1, 1] → (H, W, 3) float64 in [0, 1] in steps of 1/255."""
    return ((image_3HW.double() + 1) * 127.5).round().div(255).permute(1, 2, 0)


def test_psnr_is_the_closed_form() -> None:
    a = torch.zeros(3, 3, 4, 4)
    b = a + torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1, 1)
    assert psnr(a, b).tolist() == pytest.approx([20.0, 20 * math.log10(2), 0.0], abs=1e-6)


def test_quality_is_that_of_scikit_image() -> None:
    original = smooth(64)
    degraded = torch.stack([blurred(original)[0], original[1] * 0.8 + 0.1])
    for index, quality in enumerate(reconstruction_quality(original, degraded)):
        a, b = eight_bits(original[index]).numpy(), eight_bits(degraded[index]).numpy()
        # torchmetrics mirrors the border; scikit-image leaves 5 pixels of it out of the mean.
        mirrored = [np.pad(x, ((5, 5), (5, 5), (0, 0)), mode="reflect") for x in (a, b)]
        wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        expected = structural_similarity(*mirrored, **wang, data_range=1.0, channel_axis=2)
        assert expected < 0.99
        assert quality.ssim == pytest.approx(expected, abs=1e-4)
        assert quality.psnr_db == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (176, 210), (6, 40)])
def test_similarity_is_that_of_torchmetrics(shape: tuple[int, int]) -> None:
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure,
        structural_similarity_index_measure,
    )

    size = max(shape)
    a = (smooth(size, 3)[..., : shape[0], : shape[1]] + 1).double() / 2
    b = (blurred(smooth(size, 3)) * 0.8)[..., : shape[0], : shape[1]].add(1).double() / 2
    b[2] = 1 - a[2]  # what looks like its negative has a similarity below zero
    expected = structural_similarity_index_measure(b, a, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(a, b), expected, rtol=0, atol=1e-7)
    if min(shape) >= MS_SSIM_MIN_PX:
        over_scales = multiscale_structural_similarity_index_measure(b, a, data_range=1.0, reduction="none")
        for ours, theirs in zip(ssim_and_ms_ssim(a, b), (expected, over_scales), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def contrast_and_luminance(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """c·s and l of Wang et al. 2004, section III.B, at every pixel; (H, W, 3) in [0, 1]."""

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, mode="mirror", radius=5, axes=(0, 1))

    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    contrast = (2 * (mean(a * b) - mean_a * mean_b) + 0.03**2) / (variances + 0.03**2)
    return contrast, (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)


def test_ms_ssim_is_the_product_over_five_scales() -> None:
    """Wang et al. 2003, eq. 7, in NumPy and SciPy; its parts at the finest scale are scikit-image's SSIM."""
    original = smooth(MS_SSIM_MIN_PX)
    degraded = (blurred(original) * 0.8 + 0.1).clamp(-1, 1)
    for index, quality in enumerate(reconstruction_quality(original, degraded)):
        a, b = eight_bits(original[index]).numpy(), eight_bits(degraded[index]).numpy()
        wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        _, theirs = structural_similarity(a, b, **wang, data_range=1.0, channel_axis=2, full=True)
        inner = (slice(5, -5), slice(5, -5))
        np.testing.assert_allclose(
            np.prod(contrast_and_luminance(a, b), axis=0)[inner], theirs[inner], atol=1e-9
        )
        expected = 1.0
        for exponent in (0.0448, 0.2856, 0.3001, 0.2363):
            # torchmetrics leaves the 5 pixels at the border out of contrast, and takes the product at
            # the last scale over all.
            expected *= contrast_and_luminance(a, b)[0][inner].mean() ** exponent
            a, b = (x.reshape(len(x) // 2, 2, len(x) // 2, 2, 3).mean((1, 3)) for x in (a, b))
        expected *= np.prod(contrast_and_luminance(a, b), axis=0).mean() ** 0.1333
        assert expected < 0.99
        assert quality.ms_ssim == pytest.approx(expected, abs=1e-4)


def test_equal_images_are_perfect() -> None:
    image = smooth(MS_SSIM_MIN_PX)
    for quality in reconstruction_quality(image, image):
        assert quality.psnr_db == math.inf
        assert quality.ssim == pytest.approx(1, abs=1e-5)
        assert quality.ms_ssim == pytest.approx(1, abs=1e-5)


def test_differences_that_8_bits_cannot_hold_do_not_count() -> None:
    grey = torch.full((1, 3, 32, 32), 100 / 127.5 - 1)
    assert reconstruction_quality(grey, grey + 0.3 / 127.5)[0].psnr_db == math.inf
    # One level of 255 everywhere.
    one_off = reconstruction_quality(grey, grey + 0.7 / 127.5)[0].psnr_db
    assert one_off == pytest.approx(20 * math.log10(255), abs=1e-4)


def test_values_outside_the_range_are_clamped() -> None:
    white = torch.ones(1, 3, 32, 32)
    assert reconstruction_quality(white, white * 3)[0].psnr_db == math.inf


@pytest.mark.parametrize("shorter", [(MS_SSIM_MIN_PX - 1, MS_SSIM_MIN_PX), (MS_SSIM_MIN_PX, 100)])
def test_small_images_have_no_ms_ssim(shorter: tuple[int, int]) -> None:
    image = smooth(MS_SSIM_MIN_PX, 1)[..., : shorter[0], : shorter[1]]
    assert reconstruction_quality(image, image)[0].ms_ssim is None


def test_ms_ssim_sees_a_blur_less_than_ssim_does() -> None:
    # A blur takes the finest scale alone, to which MS-SSIM gives a weight of 0.0448.
    image = smooth(MS_SSIM_MIN_PX)
    image = (image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    for quality in reconstruction_quality(image, blurred(image)):
        assert quality.ms_ssim is not None
        assert quality.ssim < 0.95
        assert quality.ssim + 0.02 < quality.ms_ssim < 1


def test_an_image_has_the_same_quality_alone_and_in_a_batch() -> None:
    image = smooth(MS_SSIM_MIN_PX, 3)
    together = reconstruction_quality(image, blurred(image))
    for index, quality in enumerate(together):
        (alone,) = reconstruction_quality(image[index : index + 1], blurred(image[index : index + 1]))
        assert alone.psnr_db == pytest.approx(quality.psnr_db, abs=1e-9)
        assert alone.ssim == pytest.approx(quality.ssim, abs=1e-5)
        assert alone.ms_ssim == pytest.approx(quality.ms_ssim, abs=1e-5)
    assert len({round(quality.psnr_db, 3) for quality in together}) == 3


def flat(*levels: float) -> Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)


def test_nearest_label_share_counts_samples_beside_their_class() -> None:
    crops, labels = flat(-0.8, -0.6, 0.1, 0.9), torch.tensor([5, 5, 2, 7])
    # Their nearest crops are -0.8, -0.6, 0.1, 0.9 and 0.1, of classes 5, 5, 2, 7 and 2.
    samples = flat(-1.0, -0.5, 0.3, 0.6, 0.0)
    share = nearest_label_share(samples, torch.tensor([5, 5, 2, 7, 2]), crops, labels)
    assert share == 1.0
    share = nearest_label_share(samples, torch.tensor([5, 2, 2, 5, 7]), crops, labels)
    assert share == pytest.approx(2 / 5)


def test_nearest_label_share_looks_at_the_reduced_pictures() -> None:
    # Fine stripes of mean 0 are, at 16 px, nearer to grey than to either of their own levels.
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    crops = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64), -torch.ones(3, 64, 64)])
    labels, asked = torch.tensor([0, 1, 1]), torch.tensor([0])
    assert nearest_label_share(stripes, asked, crops, labels) == 1.0
    left = torch.ones(1, 3, 64, 64)
    left[..., 32:] = -1
    assert nearest_label_share(left, asked, torch.cat([left, crops]), torch.tensor([3, 0, 1, 1])) == 0.0
