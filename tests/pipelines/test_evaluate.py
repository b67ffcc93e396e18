"""Reconstruction on Ray against the same computed image by image in this process."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.autoencoder import load
from ldm.image_tensors import from_model, to_model
from ldm.latents import LatentStats, Moments
from ldm.metrics import reconstruction_quality
from ldm.preprocess import Preprocess
from pipelines.evaluate import EvaluatePool, ReconReport, Reconstruction, reconstruct
from pipelines.shards import Sample, write_tar

PREPROCESS = Preprocess(sizes_px=(32,))
REASONS = {"text": "not_an_image", "none": "no_image", "b.tar": "broken_tar"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, photo: Callable[[int], bytes]) -> Path:
    """Two shards: one whole, with a text and an empty sample among its images; one torn after an image."""
    folder = tmp_path_factory.mktemp("corpus")
    whole = [
        Sample("k1", photo(1)),
        Sample("text", b"\xff\xd8this is text"),
        Sample("k0", photo(0)),
        Sample("none", None, {"json": b"{}"}),
    ]
    write_tar(folder / "a.tar", whole)
    write_tar(folder / "b.tar", [Sample("k2", photo(2)), Sample("torn", photo(3), {"json": b"{}"})])
    data = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(data[: data.rindex(b"\x89PNG") + 600])
    return folder


def report_of(corpus: Path, vae: str, **pool: float) -> ReconReport:
    return reconstruct(str(corpus), vae, PREPROCESS, EvaluatePool.model_validate(pool))


@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_as_in_one_process(
    corpus: Path, vae_folder: Path, photo: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers have another working directory than this process: a relative folder must reach them.
    monkeypatch.chdir(vae_folder.parent)
    report = report_of(corpus, f"./{vae_folder.name}", size=2, num_cpus=0.5)
    autoencoder = load(vae_folder)
    moments: list[Moments] = []
    for index, got in enumerate(report.images):
        original = PREPROCESS.views(photo(index), f"k{index}")[0]
        image = to_model(np.stack([original]))
        moments.append(autoencoder.encode(image))
        decoded = autoencoder.decode(moments[-1].mean_BChw)
        (quality,) = reconstruction_quality(image, decoded)
        assert got.key == f"k{index}"
        np.testing.assert_array_equal(got.original, original)
        np.testing.assert_array_equal(got.reconstruction, from_model(decoded)[0])
        assert (got.psnr_db, got.ssim) == pytest.approx((quality.psnr_db, quality.ssim), abs=1e-6)
        assert got.ms_ssim is None
    assert len(moments) == 3
    stats = LatentStats.of(
        Moments(torch.cat([m.mean_BChw for m in moments]), torch.cat([m.std_BChw for m in moments]))
    )
    assert report.scaled_std == pytest.approx([0.18215 * std for std in stats.std_C], rel=1e-9)
    assert {key: reason.split(":")[0] for key, reason in report.rejected.items()} == REASONS


def test_means_leave_out_what_has_no_ms_ssim() -> None:
    pixels = np.zeros((1, 1, 3), np.uint8)
    images = [
        Reconstruction(str(i), pixels, pixels, psnr, 0.5 * i, ms)
        for i, (psnr, ms) in enumerate([(20.0, None), (30.0, 0.9)])
    ]
    assert ReconReport(tuple(images), {}, ()).means() == {"psnr_db": 25.0, "ssim": 0.25, "ms_ssim": 0.9}
    assert ReconReport(tuple(images[:1]), {}, ()).means()["ms_ssim"] is None
