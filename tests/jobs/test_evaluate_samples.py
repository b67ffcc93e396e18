"""`ldm evaluate samples`: a sweep from end to end, its figures against ones computed here, its page."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs import cli
from jobs.samples_page import plot
from ldm.bootstrap import Figure, Interval
from ldm.comparison import Comparison
from ldm.distribution import frechet_distance, kernel_distance, precision_recall
from ldm.feature_stats import FeatureStats
from ldm.features import load_extractor
from ldm.image_tensors import to_model
from ldm.preprocess import Preprocess
from pipelines.evaluate.samples import SweepPoint
from pipelines.generate import Request
from pipelines.shards import Sample, write_tar
from tests.pipelines.images_by_hand import images_by_hand

NUM_IMAGES = 7


def point(guidance: float, steps: int, *, has_few_images: bool = False) -> SweepPoint:
    fid, kid = Figure(10 / guidance, Interval(2 / guidance, 9 / guidance)), Figure(0.1, None)
    rest = (None, None, None) if has_few_images else (kid, Figure(0.5, None), Figure(0.25, None))
    return SweepPoint(guidance, steps, Comparison(fid, *rest), "0" * 64, ())


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep(
    checkpoint_folders: dict[str, Path],
    vae_folder: Path,
    photo: Callable[[int], bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, page = checkpoint_folders["v_prediction"], tmp_path / "page.html"
    write_tar(tmp_path / "a.tar", [Sample(f"k{i}", photo(i)) for i in range(9)] + [Sample("t", b"text")])
    options = f"--reference {tmp_path} --num-images {NUM_IMAGES} --guidance 1,3 --steps 2 --seed 5 --shown 2"
    actors = "--pools.sampler.num-cpus 0.5 --pools.decoder.num-cpus 0.5 --extractor random"
    repeats = "--bootstrap.resamples 20 --bootstrap.fid-resamples 5"
    command = f"evaluate samples {folder} {options} {actors} {repeats} --page {page} --json"
    assert cli.main(command.split()) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])

    assert [(p["guidance"], p["steps"]) for p in result["points"]] == [(1, 2), (3, 2)]
    assert (result["num_images"], result["num_reference"]) == (NUM_IMAGES, 9)
    assert [r["key"] for r in result["rejected"]] == ["t"]
    by_hand = figures_of(folder, vae_folder, photo, guidance=3.0)
    assert {name: result["points"][1][name] for name in by_hand} == pytest.approx(by_hand, rel=1e-3, abs=1e-4)
    assert result["points"][0]["samples_sha256"] != result["points"][1]["samples_sha256"]
    for name in ("fid", "kid"):
        low, high = result["points"][0]["intervals"][name]
        assert low < high

    html = page.read_text()
    assert "http" not in html.replace("http://www.w3.org", "")
    assert html.count('alt="sample of seed ') == html.count('alt="reference image"') == 4
    pins = result["pins"]
    for pin in ("reference sha256", "crop", "size", "rounding", "dtype", "extractor sha256", "U-Net sha256"):
        assert pins[pin] in html
    assert (pins["size"], pins["scheduler"]) == ("32 px", "ddim")
    assert pins["generated images"] == "7 at every point, seeds 5 to 11, classes: 2 in turn"


def figures_of(
    folder: Path, vae: Path, photo: Callable[[int], bytes], *, guidance: float
) -> dict[str, float]:
    requests = [Request(i % 2, 5 + i, guidance, 2, "ddim") for i in range(NUM_IMAGES)]
    made = images_by_hand(folder, vae, requests)
    real = [Preprocess(sizes_px=(32,)).views(photo(i), "")[0] for i in range(9)]
    extractor = load_extractor("random")
    a, b = (extractor(to_model(np.stack(images))).numpy() for images in (real, made))
    covered = precision_recall(a, b)
    return {
        "fid": frechet_distance(FeatureStats.of(a), FeatureStats.of(b)),
        "kid": kernel_distance(a, b),
        "precision": covered.precise_M.mean(),
        "recall": covered.recalled_N.mean(),
    }


def test_plot_of_one_point_of_few_images_and_of_many() -> None:
    """An interval that does not hold its value, and figures that are not there, are drawn all the same."""
    for points in (
        [point(1, 10, has_few_images=True)],
        [point(guidance, steps) for guidance in (1.0, 2.0, 4.0) for steps in (10, 25)],
    ):
        assert plot(points).startswith("data:image/svg+xml;base64,")
