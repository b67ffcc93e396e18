"""`ldm evaluate by-f`: its figures against PSNR computed here, its plot and its page."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import cli
from jobs.by_f_page import Point
from ldm.autoencoder import load
from ldm.bootstrap import Figure
from pipelines.shards import Sample, write_tar


def psnr_db(vae: Path, png: bytes, form: str) -> float:
    """Of a stored latent, step by step in numpy."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))[:32, 4:36]
    model = load(vae)
    image = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1)
    latent = model.encode(image).mode().numpy().astype(np.float16).astype(np.float32)
    if form == "int8":
        step = np.abs(latent).max(axis=(2, 3), keepdims=True) / 127
        latent = (np.round(latent / step) * step).astype(np.float16).astype(np.float32)
    decoded = model.decode(torch.from_numpy(latent)).numpy()[0].transpose(1, 2, 0)
    error = np.round((decoded + 1) * 127.5) - pixels
    return float(10 * np.log10(255**2 / np.square(error).mean()))


@pytest.mark.usefixtures("ray_cluster")
def test_points_of_a_vae(
    tmp_path: Path, photo: Callable[[int], bytes], vae_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = [photo(0), photo(1)]
    write_tar(tmp_path / "a.tar", [Sample(str(i), data) for i, data in enumerate(photos)])
    plot, page = tmp_path / "made/plot.png", tmp_path / "made/page.html"
    options = "--preprocess.sizes-px 32 --seconds 0.01 --threads 1 --bootstrap.resamples 20"
    command = f"evaluate by-f {tmp_path / 'a.tar'} --vaes {vae_folder} {options} --plot {plot} --page {page}"
    assert cli.main([*command.split(), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    points = result["points"]
    assert [(p["form"], p["f"], p["bits_per_pixel"]) for p in points] == [
        ("float16", 4, 3.0),
        ("int8", 4, 1.5),
    ]
    for point in points:
        expected = np.mean([psnr_db(vae_folder, png, point["form"]) for png in photos])
        assert point["psnr_db"] == pytest.approx(expected, abs=0.02)
        assert point["ms_ssim"] is None
        assert point["images_per_s"] > 0
    assert points[0]["images_per_s"] == points[1]["images_per_s"]
    assert Image.open(io.BytesIO(plot.read_bytes())).format == "PNG"
    assert result["pins"]["set sha256"] in page.read_text()


def test_bits_are_those_of_the_values() -> None:
    figures = {"psnr_db": Figure(1.0, None)}
    # 512² pixels; latents of 64² positions with 4 channels.
    expected = 64 * 64 * 4 * 16 / 512**2
    assert Point("f8", 8, 4, "float16", figures, 1.0).bits_per_pixel == expected
    assert Point("f8", 8, 4, "int8", figures, 1.0).bits_per_pixel == expected / 2
