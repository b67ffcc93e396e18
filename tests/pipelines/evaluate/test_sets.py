"""Feature sets from shards and from arrays are one and the same."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.features import load_extractor
from ldm.image_tensors import to_model
from ldm.preprocess import Preprocess
from pipelines.evaluate import EvaluatePool, ImageId, array_set, pictures_of, shard_set
from pipelines.shards import Sample, write_tar

PREPROCESS = Preprocess(sizes_px=(32,))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, photo: Callable[[int], bytes]) -> Path:
    """9 images and a text in 2 shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_tar(folder / "a.tar", [Sample(f"k{i}", photo(i)) for i in range(5)])
    write_tar(folder / "b.tar", [Sample("bad", b"text"), *(Sample(f"k{i}", photo(i)) for i in range(4))])
    return folder


@pytest.mark.usefixtures("ray_cluster")
def test_shards_and_arrays(shards: Path, photo: Callable[[int], bytes]) -> None:
    names = [("a", i, i) for i in range(5)] + [("b", i + 1, i) for i in range(4)]
    images = [(ImageId(shard, place), PREPROCESS.views(photo(seed), "")[0]) for shard, place, seed in names]
    pool = EvaluatePool(batch_size=4, size=2, num_cpus=0.5)
    of_shards = shard_set(str(shards), PREPROCESS, "random", pool, keep=6)
    halves = [array_set(part, "random", pool, keep=6) for part in (images[:3], images[3:])]
    of_arrays = halves[1].merge(halves[0])
    assert [(r.shard, r.key) for r in of_shards.rejected] == [("b", "bad")]
    assert of_shards.digest == of_arrays.digest
    assert of_shards.summary.stats.count == of_arrays.summary.stats.count == 9
    assert of_shards.summary.sample.ids == of_arrays.summary.sample.ids
    features = load_extractor("random")(to_model(np.stack([pixels for _, pixels in images]))).numpy()
    for got in (of_shards.summary, of_arrays.summary):
        np.testing.assert_allclose(got.stats.mean_D, features.mean(0), atol=1e-6)
        np.testing.assert_allclose(got.stats.covariance_DD, np.cov(features.T), atol=1e-6)
        by_id = {str(image): row for (image, _), row in zip(images, features, strict=True)}
        kept = np.stack([by_id[name] for name in got.sample.ids])
        np.testing.assert_allclose(got.sample.features_ND, kept, atol=1e-5)


@pytest.mark.usefixtures("ray_cluster")
def test_pictures_of_a_few(shards: Path, photo: Callable[[int], bytes]) -> None:
    found = pictures_of(str(shards), PREPROCESS, {ImageId("b", 0), ImageId("b", 2)})
    assert set(found) == {ImageId("b", 2)}  # the other one is no image
    np.testing.assert_array_equal(found[ImageId("b", 2)], PREPROCESS.views(photo(1), "")[0])


@pytest.mark.usefixtures("ray_cluster")
def test_a_set_without_a_usable_image(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [Sample("bad", b"text")])
    with pytest.raises(UserError, match="none of 1 images can be read"):
        shard_set(str(tmp_path), PREPROCESS, "random", EvaluatePool())
