"""Which rows of a dataset have an attribute, against its Parquet files read one by one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ldm.errors import UserError
from pipelines.attribute_rows import attribute_rows
from pipelines.dataset import LatentDataset

CAPTIONS = ["a Red car", "reddish", "a red, blue box", "blue", None, "green", "a boat in RED"]


def rows_of(folder: Path) -> dict[str, tuple[int | None, np.ndarray]]:
    """key → label and mean, as Parquet has them."""
    found = {}
    for file in sorted(folder.glob("data/*/*.parquet")):
        table = pq.read_table(file)
        means = table["mean"].combine_chunks().to_numpy_ndarray()
        for key, label, mean in zip(table["key"].to_pylist(), table["label"].to_pylist(), means, strict=True):
            found[key] = (label, mean)
    return found


def test_rows_by_class(latent_folder: Path) -> None:
    expected = rows_of(latent_folder)
    for attribute in ("dog", "1"):
        has, has_not = attribute_rows(LatentDataset.open(latent_folder), attribute, "", "label", 100)
        assert sorted(has.keys) == sorted(key for key, (label, _) in expected.items() if label == 1)
        assert sorted(has_not.keys) == sorted(key for key, (label, _) in expected.items() if label == 0)
        for side in (has, has_not):
            for key, latent in zip(side.keys, side.latents_NChw, strict=True):
                np.testing.assert_array_equal(latent, expected[key][1])


def test_the_choice_of_a_few_rows_is_a_part_of_the_choice_of_more(latent_folder: Path) -> None:
    dataset = LatentDataset.open(latent_folder)
    few, more = (attribute_rows(dataset, "cat", "dog", "label", limit)[0].keys for limit in (2, 5))
    assert (len(few), len(more)) == (2, 5)
    assert more[:2] == few


def test_rows_by_a_word_of_the_captions(write_latents: Callable[..., Path], tmp_path: Path) -> None:
    dataset = LatentDataset.open(write_latents(tmp_path / "latents", 10, captions=CAPTIONS))
    has, has_not = attribute_rows(dataset, "red", "", "caption", 100)
    assert sorted(has.keys) == ["k0", "k2", "k6"]
    assert sorted(has_not.keys) == ["k1", "k3", "k5"]
    has, has_not = attribute_rows(dataset, "red", "blue", "caption", 100)
    assert (sorted(has.keys), has_not.keys) == (["k0", "k6"], ["k3"])
    with pytest.raises(UserError, match="has no row with 'purple'"):
        attribute_rows(dataset, "purple", "", "caption", 100)


def test_what_a_dataset_does_not_have_is_told(
    write_latents: Callable[..., Path], latent_folder: Path, tmp_path: Path
) -> None:
    labelled = LatentDataset.open(latent_folder)
    with pytest.raises(UserError, match=r"unknown class 'dgo'.*did you mean 'dog'"):
        attribute_rows(labelled, "dgo", "", "label", 100)
    with pytest.raises(UserError, match="has no captions; use --by label"):
        attribute_rows(labelled, "dog", "", "caption", 100)
    unlabelled = LatentDataset.open(write_latents(tmp_path / "plain", 8, class_names=None))
    with pytest.raises(UserError, match="has no labels; use --by caption"):
        attribute_rows(unlabelled, "dog", "", "label", 100)


def test_one_shape_is_chosen_of_several(write_latents: Callable[..., Path], tmp_path: Path) -> None:
    dataset = LatentDataset.open(write_latents(tmp_path / "latents", 16, unit_sizes_px=(32, 16)))
    with pytest.raises(UserError, match=r"several sizes; give --bucket"):
        attribute_rows(dataset, "dog", "", "label", 100)
    with pytest.raises(UserError, match=r"no bucket '8x8'.*allowed: 16x16, 32x32"):
        attribute_rows(dataset, "dog", "", "label", 100, "8x8")
    has, _ = attribute_rows(dataset, "dog", "", "label", 100, "16x16")
    assert has.latents_NChw.shape[1:] == (3, 4, 4)
    assert set(has.keys) <= {f"k{i}" for i in range(8, 16)}
