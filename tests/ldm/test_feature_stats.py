"""Parts merge into what the whole gives, however it is cut up and in whatever order."""

import numpy as np
import pytest

from ldm.feature_stats import FeatureSample, FeatureStats, FeatureSummary

COUNT = 50
IDS = tuple(f"shard/{i}" for i in range(COUNT))


def features() -> np.ndarray:
    # Far from 0: a sum of squares would lose the variance.
    return np.random.default_rng(0).normal(1000, 0.1, (COUNT, 6)).astype(np.float32)


@pytest.mark.parametrize("cuts", [(25,), (1, 2, 49), (0, 50), (10, 20, 30, 40)])
@pytest.mark.parametrize("backwards", [False, True])
def test_merged_parts_are_the_whole(cuts: tuple[int, ...], backwards: bool) -> None:
    x = features()
    bounds = list(zip((0, *cuts), (*cuts, COUNT), strict=True))
    parts = [FeatureSummary.of(8, IDS[a:b], x[a:b]) for a, b in (bounds[::-1] if backwards else bounds)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    whole = FeatureSummary.of(8, IDS, x)
    assert merged.stats.count == COUNT
    np.testing.assert_allclose(merged.stats.mean_D, x.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(
        merged.stats.covariance_DD, np.cov(x.T.astype(np.float64)), rtol=1e-9, atol=1e-12
    )
    assert merged.sample.ids == whole.sample.ids
    np.testing.assert_array_equal(merged.sample.features_ND, whole.sample.features_ND)
    by_id = dict(zip(IDS, x, strict=True))
    for key, row in zip(merged.sample.ids, merged.sample.features_ND, strict=True):
        np.testing.assert_array_equal(row, by_id[key])


def test_a_sample_is_bounded_and_spread_over_the_ids() -> None:
    kept = FeatureSample.of(8, IDS, features())
    assert len(kept.ids) == len(set(kept.ids)) == 8
    assert list(kept.hashes_N) == sorted(kept.hashes_N)
    assert max(int(key.split("/")[1]) for key in kept.ids) > 25 > min(int(k.split("/")[1]) for k in kept.ids)
    everything = FeatureSample.of(100, IDS, features())
    assert set(everything.ids) == set(IDS)
    assert everything.ids[:8] == kept.ids


def test_one_image_has_no_covariance() -> None:
    assert not FeatureStats.of(features()[:1]).covariance_DD.any()


def test_parts_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="6 and 5 features"):
        FeatureStats.of(features()).merge(FeatureStats.of(features()[:, :5]))
    with pytest.raises(ValueError, match="8 and 9 images"):
        FeatureSample.of(8, IDS, features()).merge(FeatureSample.of(9, IDS, features()))
