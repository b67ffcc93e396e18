"""VAE training: the loss against its formula, crops, what is refused, one real run."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jobs.train_vae import TrainVaeJob
from ldm.autoencoder import load
from ldm.errors import UserError
from ldm.image_tensors import to_model
from ldm.latents import LatentStats
from ldm.vae_loss import VaeLoss
from pipelines.shards import Sample, list_shards, write_tar
from pipelines.train.crops import crops
from pipelines.train.vae import check, set_scale
from pipelines.train.vae_config import VaeTraining

# A photo of 40×32 pixels gives 8 crops in every pass.
CROPS_PER_MEGAPIXEL = 8 / (40 * 32 / 1e6)


def training(**options: object) -> VaeTraining:
    values = {"crop_px": 16, "crops_per_megapixel": CROPS_PER_MEGAPIXEL, **options}
    return VaeTraining.model_validate(values)


@pytest.fixture(scope="module")
def shards_folder(tmp_path_factory: pytest.TempPathFactory, photo: Callable[[int], bytes]) -> Path:
    """Five photos in one tar, with a text, an empty sample and a torn end."""
    folder = tmp_path_factory.mktemp("shards")
    samples = [Sample(f"k{i}", photo(i)) for i in range(5)]
    bad = [Sample("text", b"\xff\xd8this is text"), Sample("none", None, {"json": b"{}"})]
    write_tar(folder / "a.tar", [*samples[:2], *bad, *samples[2:], Sample("torn", photo(9), {"json": b"{}"})])
    data = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(data[: data.rindex(b"\x89PNG") + 600])
    return folder


def crops_of(folder: Path, config: VaeTraining, pass_index: int = 0) -> np.ndarray:
    (shard,) = list_shards(folder)
    return np.stack([crop["image"] for crop in crops(shard, pass_index, config)])


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_loss_is_the_formula(vae_folder: Path, loss: str) -> None:
    vae = load(vae_folder).vae
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        terms = VaeLoss(vae, loss, 0.25)(images)
        torch.manual_seed(1)
        posterior = vae.encode(images).latent_dist
        mean, var = posterior.mean, posterior.std.square()
        error = vae.decode(mean + posterior.std * torch.randn(mean.shape)).sample - images
    expected = error.abs().mean() if loss == "l1" else error.square().mean()
    expected_kl = 0.5 * (mean.square() + var - 1 - var.log()).sum() / images.numel()
    torch.testing.assert_close(terms.reconstruction, expected)
    torch.testing.assert_close(terms.kl, expected_kl)
    torch.testing.assert_close(terms.loss, expected + 0.25 * expected_kl)


def test_loss_goes_through_the_modules_own_forward_pass(vae_folder: Path) -> None:
    """What DDP hooks into: encoder and decoder get gradients from a call of the one module."""
    vae = load(vae_folder).vae.requires_grad_(True)
    module = VaeLoss(vae, "mse", 1e-3)
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module(torch.rand(1, 3, 16, 16)).loss.backward()
    assert calls == ["forward"]
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_crops_depend_on_seed_pass_and_key_alone(
    shards_folder: Path, tmp_path: Path, photo: Callable[[int], bytes]
) -> None:
    whole = crops_of(shards_folder, training())
    assert (whole.shape, whole.dtype) == ((5 * 8, 16, 16, 3), np.uint8)
    assert len({crop.tobytes() for crop in whole}) == len(whole)
    np.testing.assert_array_equal(crops_of(shards_folder, training()), whole)
    write_tar(tmp_path / "a.tar", [Sample("k3", photo(3))])
    np.testing.assert_array_equal(crops_of(tmp_path, training()), whole[3 * 8 : 4 * 8])
    for other in (crops_of(shards_folder, training(), 1), crops_of(shards_folder, training(seed=1))):
        assert not {crop.tobytes() for crop in whole} & {crop.tobytes() for crop in other}


def test_without_zoom_a_crop_of_the_full_size_is_the_picture_or_its_mirror_image(
    tmp_path: Path, photo: Callable[[int], bytes]
) -> None:
    from ldm.images import decode_image, encode_png

    square = np.asarray(decode_image(photo(0)))[:, :32]
    write_tar(tmp_path / "a.tar", [Sample("k", encode_png(square))])
    found = crops_of(tmp_path, training(crop_px=32, zoom_max=1.0, crops_per_megapixel=20 / (32 * 32 / 1e6)))
    assert {crop.tobytes() for crop in found} == {square.tobytes(), square[:, ::-1].tobytes()}


def test_a_small_picture_gives_its_share_of_crops_over_the_passes(shards_folder: Path) -> None:
    (shard,) = list_shards(shards_folder)
    config = training(crops_per_megapixel=0.3 / (40 * 32 / 1e6))
    counts = [len(list(crops(shard, index, config))) for index in range(200)]
    assert sum(counts) == pytest.approx(200 * 5 * 0.3, abs=5)
    assert max(counts) <= 5 and len(set(counts)) > 1


def test_scale_is_measured(vae_folder: Path) -> None:
    vae = load(vae_folder).vae
    images = to_model(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    stats = LatentStats.of(load(vae_folder).encode(images))
    set_scale(vae, stats)
    assert vae.config["scaling_factor"] == pytest.approx(stats.scaling_factor, abs=1e-5)


def test_check_accepts_what_can_be_trained(shards_folder: Path, vae_folder: Path) -> None:
    check(str(shards_folder), training(preset="f4"))
    check(str(shards_folder), training(init=str(vae_folder)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "f5"}, "no VAE preset 'f5'; allowed: f4, f8"),
        ({"preset": "f4", "crop_px": 18}, "18×18 pixels does not fit.*multiples of 4; use 20×20"),
        ({"init": "/nowhere"}, "no VAE at '/nowhere'"),
        ({"preset": "f4", "batch_size": 3, "num_workers": 2}, "batch of 3 cannot be shared by 2 workers"),
    ],
)
def test_check_refuses(shards_folder: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(str(shards_folder), training(**options))


def test_check_refuses_what_is_no_autoencoder_kl(shards_folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match="cannot train a AutoencoderTiny; allowed: AutoencoderKL"):
        check(str(shards_folder), training(init=str(tmp_path / "tiny")))


@pytest.mark.parametrize(
    "samples", [[], [Sample("a", None, {"json": b"{}"})], [Sample("a", b"\xff\xd8text")]]
)
def test_check_refuses_an_input_without_a_usable_image(samples: list[Sample], tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(UserError, match="no usable image in"):
        check(str(tmp_path), training(preset="f4"))


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_leaves_a_vae_that_loads(shards_folder: Path, vae_folder: Path, tmp_path: Path) -> None:
    config = training(
        init=str(vae_folder), steps=3, batch_size=2, log_every=2, ema_decay=0.5, threads=1, dtype="fp16"
    )
    result = TrainVaeJob(input=str(shards_folder), out=tmp_path / "out", train=config).run()
    trained, start = load(tmp_path / "out"), load(vae_folder)
    assert (result["step"], result["f"], result["fingerprint"]) == (3, 4, trained.fingerprint)
    assert trained.fingerprint != start.fingerprint
    assert {t.dtype for t in load_file(next((tmp_path / "out").glob("*.safetensors"))).values()} == {
        torch.float16
    }
    assert "dtype: fp16" in (tmp_path / "out/train.yaml").read_text()
    factor = json.loads((tmp_path / "out/config.json").read_text())["scaling_factor"]
    seen = to_model(np.concatenate([crops_of(shards_folder, config, index) for index in range(2)]))
    assert factor == pytest.approx(LatentStats.of(trained.encode(seen)).scaling_factor, rel=0.05)
