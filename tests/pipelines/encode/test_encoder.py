"""What fp16 cannot hold, several sizes, memory that runs out, batches that kill, forms of storage."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from ldm.autoencoder import load
from ldm.errors import BadSampleError
from ldm.image_tensors import to_model
from ldm.latents import keyed_normal
from ldm.seeds import keyed_seed
from pipelines.encode.attempts import Attempt, Mark
from pipelines.encode.encoder import stored_moments
from pipelines.encode.micro_batches import ALONE, ImageEncoder, MomentPair
from pipelines.encode.pools import EncoderPool
from pipelines.storage_form import StorageForm


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
        stored_moments((means, stds), StorageForm(), "k", 0)
    assert caught.value.reason == reason


def test_the_largest_fp16_is_kept() -> None:
    mean, std = stored_moments((torch.full((1, 1, 1), -65504.0), torch.zeros(1, 1, 1)), StorageForm(), "k", 0)
    assert (mean.dtype, mean.item(), std.item()) == (np.float16, -65504.0, 0.0)


def test_images_of_two_sizes_come_back_in_order(vae_folder: Path, tmp_path: Path) -> None:
    autoencoder = load(vae_folder)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (size, 16, 3), dtype=np.uint8) for size in (16, 32, 16, 32, 16)]
    encoder = ImageEncoder(autoencoder, EncoderPool(micro_batch=2), torch.device("cpu"))
    attempt = Attempt({}, Mark(tmp_path / "mark"))
    for image, moments in zip(images, encoder.encode(images, attempt), strict=True):
        assert not isinstance(moments, BadSampleError)
        mean, std = moments
        alone = autoencoder.encode(to_model(image[None]))
        torch.testing.assert_close(mean, alone.mean_BChw[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(std, alone.std_BChw[0], rtol=1e-5, atol=1e-5)


FORMS = [("mode", "float16"), ("sample", "float16"), ("moments", "int8")]


class Halving(ImageEncoder):
    """Has memory for so many images at a time."""

    room = 2
    sizes: ClassVar[list[int]] = []

    def _forward(self, images: Sequence[np.ndarray], precision: torch.dtype) -> list[MomentPair]:
        self.sizes.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("no room")
        return super()._forward(images, precision)


@pytest.fixture
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(11)]


def test_a_batch_without_memory_is_halved_for_good(
    vae_folder: Path, tmp_path: Path, images: list[np.ndarray]
) -> None:
    encoder = Halving(load(vae_folder), EncoderPool(micro_batch=8), torch.device("cpu"))
    Halving.sizes.clear()
    found = encoder.encode(images, Attempt({}, Mark(tmp_path / "mark")))
    assert Halving.sizes == [8, 4, 2, 2, 4, 2, 2, 2, 1]
    assert encoder.micro_batch == 2
    assert not any(isinstance(moments, BadSampleError) for moments in found)


def test_an_image_without_memory_alone_is_rejected(
    vae_folder: Path, tmp_path: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Halving, "room", 0)
    encoder = Halving(load(vae_folder), EncoderPool(micro_batch=4), torch.device("cpu"))
    found = encoder.encode(images[:2], Attempt({}, Mark(tmp_path / "mark")))
    assert [moments.reason for moments in found if isinstance(moments, BadSampleError)] == [
        "out_of_memory"
    ] * 2


def test_an_error_that_is_not_about_memory_passes(
    vae_folder: Path, tmp_path: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Halving(load(vae_folder), EncoderPool(micro_batch=2), torch.device("cpu"))

    def broken(*args: object) -> list[MomentPair]:
        raise RuntimeError("broken kernel")

    monkeypatch.setattr(encoder, "_forward", broken)
    with pytest.raises(RuntimeError, match="broken kernel"):
        encoder.encode(images, Attempt({}, Mark(tmp_path / "mark")))


def test_a_batch_that_killed_its_worker_twice_goes_image_by_image(
    vae_folder: Path, tmp_path: Path, images: list[np.ndarray]
) -> None:
    encoder = ImageEncoder(load(vae_folder), EncoderPool(micro_batch=4), torch.device("cpu"))
    clean = encoder.encode(images, Attempt({}, Mark(tmp_path / "mark")))
    # Twice at the batch of images 4 … 7, then once at image 6 alone.
    suspected = encoder.encode(images, Attempt({4: 2, ALONE + 6: 1}, Mark(tmp_path / "mark")))
    bad = [index for index, moments in enumerate(suspected) if isinstance(moments, BadSampleError)]
    assert bad == [6] and suspected[6].reason == "killed_worker"  # type: ignore[union-attr]
    for index in (0, 3, 5, 8):
        torch.testing.assert_close(suspected[index], clean[index], rtol=1e-5, atol=1e-5)


def test_what_overflows_in_low_precision_is_done_again_in_fp32(
    vae_folder: Path, tmp_path: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = ImageEncoder(load(vae_folder), EncoderPool(precision="bf16"), torch.device("cpu"))
    exact = ImageEncoder(load(vae_folder), EncoderPool(), torch.device("cpu"))
    forward = encoder._forward

    def overflowing(images: Sequence[np.ndarray], precision: torch.dtype) -> list[MomentPair]:
        pairs = forward(images, precision)
        if precision is torch.bfloat16:
            pairs[1] = torch.full_like(pairs[1][0], torch.inf), pairs[1][1]
        return pairs

    monkeypatch.setattr(encoder, "_forward", overflowing)
    low = encoder.encode(images[:3], Attempt({}, Mark(tmp_path / "mark")))
    high = exact.encode(images[:3], Attempt({}, Mark(tmp_path / "mark")))
    torch.testing.assert_close(low[1], high[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(low[0], high[0], rtol=0.05, atol=0.05)
    assert not torch.equal(low[0][0], high[0][0])  # type: ignore[index]


@pytest.mark.parametrize(
    ("stored", "dtype"), [("mode", "float16"), ("sample", "float16"), ("moments", "int8")]
)
def test_forms_are_what_a_reader_will_see(stored: str, dtype: str) -> None:
    mean, std = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((3, 4, 4), 0.5)
    form = StorageForm(stored=stored, dtype=dtype)  # type: ignore[arg-type]
    got_mean, got_std = stored_moments((mean, std), form, "k", 0)
    if stored == "sample":
        noise = keyed_normal([keyed_seed("stored sample", 0, "k", 0)], (3, 4, 4))[0]
        assert np.array_equal(got_mean, (mean + std * noise).half().numpy())
        assert not np.array_equal(got_mean, stored_moments((mean, std), form, "k", 1)[0])
    elif dtype == "int8":
        step = np.abs(mean.half().numpy()).max((1, 2), keepdims=True) / 127
        assert (np.abs(got_mean.astype(np.float32) - mean.half().numpy()) <= step * 0.51).all()
    else:
        assert np.array_equal(got_mean, mean.half().numpy())
    assert got_std.any() == (stored == "moments")
