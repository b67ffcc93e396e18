"""The parts of ``ldm bench tiling`` that are quick, on images that are small."""

import pytest
import torch

from jobs.bench import tiling_exact
from jobs.bench.random_vaes import latent, random_kl
from jobs.bench.tiling_ways import diffusers_tiling, error, exact_decode, tile_statistics, whole_decode
from jobs.bench_tiling import BenchTilingJob
from ldm.errors import UserError


def test_other_ways_are_complete_and_not_exact() -> None:
    autoencoder, latent_Chw = random_kl(8, torch.float32), latent(40, 52, torch.float32)
    wanted = whole_decode(autoencoder, latent_Chw)
    for way in (diffusers_tiling, tile_statistics):
        got = way(autoencoder, latent_Chw, 16)
        assert got.shape == wanted.shape
        assert error(got, wanted) > 0.1
    assert error(exact_decode(autoencoder, latent_Chw, 16), wanted) < 1e-4


def test_one_tile_with_statistics_of_its_own_is_the_whole_image() -> None:
    autoencoder, latent_Chw = random_kl(8, torch.float64), latent(10, 12)
    assert torch.equal(tile_statistics(autoencoder, latent_Chw, 12), whole_decode(autoencoder, latent_Chw))


def test_cases_are_chosen_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image_3HW = latent(64, 96, torch.float64)[:3]
    made = [
        tiling_exact.Case(name, random_kl(8, torch.float64), latent(8, 12), image_3HW, 4)
        for name in ("f8", "g8")
    ]
    monkeypatch.setattr(tiling_exact, "cases", lambda quick: made)
    monkeypatch.setattr(tiling_exact, "with_its_layout", lambda size_px: {})
    result = BenchTilingJob(only=("exact",), case="g", threads=1).run()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "8 fp64" in line] == ["g8"]
    assert 0 < float(str(result["exact_fp64"])) < 1e-10
    with pytest.raises(UserError, match="no case has 'h' in its name"):
        BenchTilingJob(only=("exact",), case="h", threads=1).run()


def test_photographs_are_compared_with_the_whole_decode() -> None:
    job = BenchTilingJob(only=("photos",), photo_sizes_px=(256,), num_photos=1, tile=8, threads=1)
    result = job.run()
    assert float(str(result["fast_psnr_db"])) > float(str(result["diffusers_psnr_db"])) + 5
    assert 0.9 < float(str(result["fast_seam"])) < 1.1
