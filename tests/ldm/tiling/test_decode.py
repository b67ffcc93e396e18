"""Tiled decoding against one call of the VAE, and what it needs and refuses."""

from pathlib import Path

import pytest
import torch

from jobs.bench.random_vaes import latent, random_kl, random_tiny
from ldm.autoencoder import Autoencoder, load
from ldm.errors import UserError
from ldm.tiling import exact, maps
from ldm.tiling.config import Tiling
from ldm.tiling.decode import decode, decode_rows, plan
from ldm.tiling.maps import BandedMap, Storage

LAYOUTS = [
    pytest.param(f, layers, attention, id=f"f{f}-{layers}layers{'-attention' * attention}")
    for f in (4, 8, 16)
    for layers in (1, 2)
    for attention in (False, True)
]


def whole(autoencoder: Autoencoder, latent_Chw: torch.Tensor) -> torch.Tensor:
    """The VAE's own result, without the bounds of an image."""
    with torch.inference_mode():
        image: torch.Tensor = autoencoder.vae.decode(latent_Chw[None]).sample[0]
    return image


def tiled(autoencoder: Autoencoder, latent_Chw: torch.Tensor, tile: int) -> torch.Tensor:
    """`ldm.tiling.decode` in mode exact, in the VAE's precision and without the bounds of an image."""
    planned = plan(autoencoder, latent_Chw.shape, Tiling(mode="exact", tile=tile))
    with torch.inference_mode():
        rows = exact.run(planned.steps, planned.grid, BandedMap.whole(latent_Chw, Storage()), Storage())
        return torch.cat([band.values_rWC for band in rows]).permute(2, 0, 1)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the wanted one's standard deviation."""
    return float((got - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize(("f", "layers", "attention"), LAYOUTS)
def test_exact_is_the_whole_decode(f: int, layers: int, attention: bool) -> None:
    autoencoder = random_kl(f, layers=layers, attention=attention)
    latent_Chw = latent(13, 19)
    wanted = whole(autoencoder, latent_Chw)
    for tile in (3, 16):
        assert error(tiled(autoencoder, latent_Chw, tile), wanted) < 1e-10


def test_exact_in_single_precision() -> None:
    autoencoder = random_kl(8, torch.float32, layers=2, attention=True)
    latent_Chw = latent(40, 64, torch.float32)
    assert error(tiled(autoencoder, latent_Chw, 16), whole(autoencoder, latent_Chw)) < 1e-4


@pytest.mark.parametrize(
    "options", [{"use_quant_conv": False, "use_post_quant_conv": False}, {"act_fn": "gelu"}]
)
def test_other_layouts(options: dict[str, object]) -> None:
    autoencoder, latent_Chw = random_kl(4, **options), latent(9, 7)
    assert error(tiled(autoencoder, latent_Chw, 4), whole(autoencoder, latent_Chw)) < 1e-10


def test_a_tiny_autoencoder_has_no_statistics_so_fast_is_exact_too() -> None:
    autoencoder, latent_Chw = random_tiny(), latent(11, 14)
    wanted = whole(autoencoder, latent_Chw)
    assert error(tiled(autoencoder, latent_Chw, 4), wanted) < 1e-10
    fast = decode(autoencoder, latent_Chw, Tiling(mode="fast", tile=4))
    assert (fast - wanted.clamp(-1, 1)).abs().max() < 1e-6


def test_fast_with_a_copy_of_the_same_statistics_is_exact() -> None:
    """2 × 2 equal values everywhere: pooling changes nothing inside, so that only the border tells."""
    autoencoder = random_kl(8, torch.float32)
    constant_Chw = torch.ones((4, 40, 48)) * torch.tensor([0.5, -1.0, 2.0, 0.0])[:, None, None]
    fast = decode(autoencoder, constant_Chw, Tiling(mode="fast", tile=8))
    middle = (slice(None), slice(100, 200), slice(100, 200))
    assert fast[middle].std(dim=(1, 2)).max() < 1e-3


@pytest.mark.parametrize("tile", [5, 16])
def test_fast_has_no_seam_since_its_tiles_do_not_matter(tile: int) -> None:
    autoencoder, latent_Chw = load("f8").to("cpu"), latent(40, 36, torch.float32)
    one = decode(autoencoder, latent_Chw, Tiling(mode="fast", tile=64))
    assert (decode(autoencoder, latent_Chw, Tiling(mode="fast", tile=tile)) - one).abs().max() < 1e-4


def test_modes_agree_on_the_default_vae() -> None:
    autoencoder, latent_Chw = load("f4").to("cpu", channels_last=False), 0.5 * torch.randn(3, 24, 24)
    modes = {mode: decode(autoencoder, latent_Chw, Tiling(mode=mode, tile=8)) for mode in ("whole", "exact")}
    assert modes["whole"].shape == (3, 96, 96)
    assert (modes["exact"] - modes["whole"]).abs().max() < 1e-5


def test_spilled_maps_change_no_bit_and_leave_nothing(tmp_path: Path) -> None:
    autoencoder, latent_Chw = random_kl(4, torch.float32, attention=True), latent(21, 16, torch.float32)
    kept = decode(autoencoder, latent_Chw, Tiling(mode="exact", tile=8))
    rows = decode_rows(autoencoder, latent_Chw, Tiling(mode="exact", tile=8, spill=tmp_path / "spill"))
    assert torch.equal(torch.cat([band.values_rWC for band in rows]).permute(2, 0, 1), kept)
    assert list((tmp_path / "spill").iterdir()) == []


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("attention", [False, True])
def test_the_memory_that_is_announced_is_the_memory_that_is_used(
    monkeypatch: pytest.MonkeyPatch, mode: str, attention: bool
) -> None:
    used = _Counting()
    monkeypatch.setattr(maps.Storage, "empty", used.empty)
    tiling = Tiling.model_validate({"mode": mode, "tile": 4})
    autoencoder, latent_Chw = (
        random_kl(8, torch.float32, layers=2, attention=attention),
        latent(64, 40, torch.float32),
    )
    planned = plan(autoencoder, latent_Chw.shape, tiling)
    for _ in decode_rows(autoencoder, latent_Chw, tiling):
        pass
    assert 0.6 * planned.needed_bytes <= used.peak_bytes <= planned.needed_bytes


class _Counting:
    """`Storage.empty`, which counts the bytes that are there at the same time."""

    def __init__(self) -> None:
        self.now_bytes = self.peak_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import weakref

        made = torch.empty(shape, dtype=dtype)
        num_bytes = made.nbytes
        self.now_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(made, self._freed, num_bytes)
        return made

    def _freed(self, num_bytes: int) -> None:
        self.now_bytes -= num_bytes


@pytest.mark.parametrize("mode", ["whole", "exact", "fast"])
def test_a_latent_of_another_vae_is_refused(mode: str) -> None:
    with pytest.raises(UserError, match=r"a latent of shape \(1, 5, 8, 8\) is not one of VAE"):
        decode_rows(random_kl(4), torch.zeros(5, 8, 8), Tiling.model_validate({"mode": mode}))


def test_too_little_memory_is_refused_with_both_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from types import SimpleNamespace

    autoencoder, latent_Chw = random_kl(8, torch.float32), torch.zeros(4, 512, 512)
    monkeypatch.setattr(maps.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000_000))
    with pytest.raises(UserError, match=r"feature maps need 1\.\d\d GB, and memory has 10 MB; give a folder"):
        decode_rows(autoencoder, latent_Chw, Tiling(mode="exact"))
    monkeypatch.setattr(maps.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000_000))
    with pytest.raises(UserError, match=r"spill folder \S+ has 20 MB; give one with more room"):
        decode_rows(autoencoder, latent_Chw, Tiling(mode="exact", spill=tmp_path))


def test_a_vae_that_cannot_be_tiled_is_refused() -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("AttnDownEncoderBlock2D",) * 2,
        up_block_types=("AttnUpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    )
    with pytest.raises(
        UserError, match=r"AttnUpDecoderBlock2D cannot be tiled; allowed: .*; use --tiling.mode whole"
    ):
        decode_rows(Autoencoder(vae), torch.zeros(4, 8, 8), Tiling(mode="fast"))
