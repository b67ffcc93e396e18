"""Reconstruction on Ray against the same computed image by image in this process."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.data import DataContext

from ldm.autoencoder import load
from ldm.bootstrap import BootstrapConfig
from ldm.comparison import compare
from ldm.distribution import kernel_distance
from ldm.features import load_extractor
from ldm.image_tensors import from_model, to_model
from ldm.latents import LatentStats, Moments
from ldm.metrics import reconstruction_quality
from ldm.perceptual import load_perceptual
from ldm.preprocess import Preprocess
from pipelines.evaluate import EvaluatePool, ImageId, Measured, ReconModels, measure, reconstruct
from pipelines.shards import Sample, write_tar

PREPROCESS = Preprocess(sizes_px=(32,))
# Two keys are equal: "k0" lies in both shards.
IMAGES = [("a", 0, "k1", 1), ("a", 2, "k0", 0), ("b", 0, "k0", 2)]
REASONS = [("a", "text", "not_an_image"), ("a", "none", "no_image"), ("b", "b.tar", "broken_tar")]


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
    write_tar(folder / "b.tar", [Sample("k0", photo(2)), Sample("torn", photo(3), {"json": b"{}"})])
    data = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(data[: data.rindex(b"\x89PNG") + 600])
    return folder


@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_as_in_one_process(corpus: Path, vae_folder: Path, photo: Callable[[int], bytes]) -> None:
    models = ReconModels(str(vae_folder), extractor="random", perceptual="random")
    report = measure(str(corpus), models, PREPROCESS, EvaluatePool(size=2, num_cpus=0.5))
    pictures = {r.id: r for r in reconstruct(str(corpus), str(vae_folder), PREPROCESS, EvaluatePool())}
    autoencoder, perceptual = load(vae_folder), load_perceptual("random")
    moments: list[Moments] = []
    assert [(r.shard, r.position, r.key) for r in report.images] == [image[:3] for image in IMAGES]
    assert set(pictures) == {ImageId(shard, position) for shard, position, *_ in IMAGES}
    for got, (*_, key, seed) in zip(report.images, IMAGES, strict=True):
        original = PREPROCESS.views(photo(seed), key)[0]
        image = to_model(np.stack([original]))
        moments.append(autoencoder.encode(image))
        decoded = from_model(autoencoder.decode(moments[-1].mean_BChw))
        (quality,) = reconstruction_quality(image, to_model(decoded))
        np.testing.assert_array_equal(pictures[got.id].original, original)
        np.testing.assert_array_equal(pictures[got.id].reconstruction, decoded[0])
        for figures in (got, pictures[got.id]):
            assert (figures.psnr_db, figures.ssim) == pytest.approx((quality.psnr_db, quality.ssim), abs=1e-9)
            assert figures.ms_ssim is None
        assert got.distance == pytest.approx(float(perceptual(image, to_model(decoded))), abs=1e-6)
    stats = LatentStats.of(
        Moments(torch.cat([m.mean_BChw for m in moments]), torch.cat([m.std_BChw for m in moments]))
    )
    assert report.scaled_std == pytest.approx([0.18215 * std for std in stats.std_C], rel=1e-9)
    assert [(r.shard, r.key, r.reason.split(":")[0]) for r in report.rejected] == REASONS
    assert set(report.values()) == {"psnr_db", "ssim", "distance"}
    check_features(report, photo, [pictures[r.id].reconstruction for r in report.images])


def check_features(report: Measured, photo: Callable[[int], bytes], decoded: list[np.ndarray]) -> None:
    """KID over the kept features against that of features computed here."""
    extractor = load_extractor("random")
    originals = [PREPROCESS.views(photo(seed), key)[0] for *_, key, seed in IMAGES]
    a, b = (extractor(to_model(np.stack(images))).numpy() for images in (originals, decoded))
    assert report.originals is not None and report.reconstructions is not None
    assert report.originals.stats.count == report.reconstructions.stats.count == 3
    assert report.originals.sample.ids == report.reconstructions.sample.ids
    kept = report.originals.sample.features_ND, report.reconstructions.sample.features_ND
    assert kernel_distance(*kept) == pytest.approx(kernel_distance(a, b), rel=1e-4)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, photo: Callable[[int], bytes]) -> Path:
    """96 images in 16 shards: a shard takes an actor longer than reading it, so that several get some."""
    folder = tmp_path_factory.mktemp("many")
    for shard in range(16):
        samples = [Sample(f"k{i}", photo(100 + i)) for i in range(96) if i % 16 == shard]
        write_tar(folder / f"s{shard:02}.tar", samples)
    return folder


@pytest.mark.usefixtures("ray_cluster")
def test_four_workers_give_the_figures_of_one(
    many: Path, vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else the first actor to come up could have done everything before there is a second one.
    monkeypatch.setattr(DataContext.get_current(), "wait_for_min_actors_s", 120)
    models = ReconModels(str(vae_folder), extractor="random", perceptual="random")
    one, four = (
        measure(str(many), models, PREPROCESS, EvaluatePool(size=size, num_cpus=0.5), keep=20)
        for size in (1, 4)
    )
    # Which actor gets a block is Ray's choice: it may give one of the four nothing.
    assert len(one.processes) == 1 < len(four.processes) <= 4
    print(f"{len(four.processes)} of four took part")
    assert len(one.images) == 96
    assert four.images == one.images
    assert four.digest == one.digest
    assert four.scaled_std == one.scaled_std
    comparisons = []
    for measured in (one, four):
        assert measured.originals is not None and measured.reconstructions is not None
        assert len(measured.originals.sample.ids) == 20
        config = BootstrapConfig(resamples=50, fid_resamples=10)
        comparisons.append(compare(measured.originals, measured.reconstructions, config, paired=True))
    for name, figure in comparisons[0].figures().items():
        other = comparisons[1].figures()[name]
        assert figure is not None and other is not None
        assert figure.value == pytest.approx(other.value, abs=1e-6)
        assert figure.interval == pytest.approx(other.interval, abs=1e-6)
    assert comparisons[0].fid.value > 1e-3


@pytest.mark.usefixtures("ray_cluster")
def test_only_the_asked_pictures_come(many: Path, vae_folder: Path) -> None:
    wanted = {ImageId("s01", 1), ImageId("s04", 0)}
    found = list(reconstruct(str(many), str(vae_folder), PREPROCESS, EvaluatePool(), only=wanted))
    assert {r.id for r in found} == wanted
    assert {r.key for r in found} == {"k17", "k4"}
