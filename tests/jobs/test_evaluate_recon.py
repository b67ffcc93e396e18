"""`ldm evaluate recon`: its JSON, its page, its pictures."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs import cli
from jobs.recon_page import choose, difference, picture_name
from pipelines.evaluate import ImageFigures
from pipelines.shards import Sample, write_tar


def figures(position: int, psnr_db: float, distance: float | None = None, **names: str) -> ImageFigures:
    return ImageFigures(
        names.get("shard", "a"), position, names.get("key", "k"), psnr_db, 0.5, None, distance
    )


@pytest.mark.usefixtures("ray_cluster")
def test_equal_keys_a_strangers_key_and_an_unreadable_image(
    tmp_path: Path, photo: Callable[[int], bytes], vae_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, pictures, page = tmp_path / "in", tmp_path / "pictures", tmp_path / "made" / "page.html"
    shards.mkdir()
    write_tar(shards / "a.tar", [Sample("k", photo(0)), Sample("<script>é", photo(1)), Sample("t", b"text")])
    write_tar(shards / "b.tar", [Sample("k", photo(2))])
    options = "--preprocess.sizes-px 32 --extractor random --perceptual random --shown 2"
    repeats = "--bootstrap.resamples 20 --bootstrap.fid-resamples 5"
    command = (
        f"evaluate recon {shards} --vae {vae_folder} {options} {repeats} --pictures {pictures} --page {page}"
    )
    assert cli.main([*command.split(), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])

    names = ["a-000000-k.png", "a-000001-_script__.png", "b-000000-k.png"]
    assert sorted(path.name for path in pictures.iterdir()) == names
    assert len({(pictures / name).read_bytes() for name in names}) == 3
    assert [(i["shard"], i["position"]) for i in result["images"]] == [("a", 0), ("a", 1), ("b", 0)]
    assert result["psnr_db"] == pytest.approx(np.mean([i["psnr_db"] for i in result["images"]]), rel=1e-9)
    assert [r["key"] for r in result["rejected"]] == ["t"]
    assert result["ms_ssim"] is None
    assert {"psnr_db", "ssim", "distance", "rfid", "rkid"} == set(result["intervals"])
    low, high = result["intervals"]["psnr_db"]
    assert low <= result["psnr_db"] <= high

    html = page.read_text()
    assert "http" not in html.replace("http://www.w3.org", "")
    assert "<script>" not in html
    assert html.count('alt="original ') == html.count('alt="difference ') == 4
    assert "not_an_image" in html
    pins = result["pins"]
    for pin in ("set sha256", "crop", "size", "resize", "rounding", "dtype", "extractor sha256", "images"):
        assert pins[pin] in html
    assert pins["images"] == "3"
    assert pins["VAE sha256"] == result["fingerprint"]


def test_worst_and_median() -> None:
    by_psnr = [figures(i, psnr) for i, psnr in enumerate([30.0, 10, 50, 20, 40, 60, 70])]
    chosen = choose(by_psnr, 2)
    assert (chosen.metric, [i.psnr_db for i in chosen.worst]) == ("psnr_db", [10, 20])
    assert [i.psnr_db for i in chosen.median] == [30, 40]
    assert [i.psnr_db for i in choose(by_psnr, 3).median] == [30, 40, 50]
    by_distance = [figures(i, 1, distance) for i, distance in enumerate([0.1, 0.9, 0.5])]
    chosen = choose(by_distance, 1)
    assert [i.distance for i in (*chosen.worst, *chosen.median)] == [0.9, 0.5]
    assert len(choose(by_distance, 9).worst) == len(choose(by_distance, 9).median) == 3


def test_difference_is_amplified_and_clipped() -> None:
    a, b = np.array([[[0, 10, 255]]], np.uint8), np.array([[[3, 4, 0]]], np.uint8)
    np.testing.assert_array_equal(difference(a, b), [[[12, 24, 255]]])
    np.testing.assert_array_equal(difference(b, a), [[[12, 24, 255]]])


def test_a_name_is_a_file_name_and_no_two_are_equal() -> None:
    odd = ["../../x", "a/b", "a_b", "é" * 300, "", "a\0b"]
    names = {picture_name(figures(i, 1, key=key)) for i, key in enumerate(odd)}
    names |= {picture_name(figures(0, 1, key="a_b", shard=shard)) for shard in ("x", "y" * 300)}
    assert len(names) == 8
    assert all(len(name) < 200 and "/" not in name and name.isascii() for name in names)
