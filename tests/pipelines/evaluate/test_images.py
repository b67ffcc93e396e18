"""What a set of images is known by."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldm.preprocess import Preprocess
from pipelines.evaluate.images import ImageId, image_rows, pixel_digest, set_digest, shards_with
from pipelines.shards import Sample, write_tar


@pytest.mark.usefixtures("ray_cluster")
def test_the_digest_is_that_of_the_pixels_whatever_the_shards(
    photo: Callable[[int], bytes], tmp_path: Path
) -> None:
    def digest(folder: str, size_px: int = 32) -> str:
        shards = shards_with(str(tmp_path / folder))
        rows = image_rows(shards, Preprocess(sizes_px=(size_px,))).take_all()
        return set_digest([row["digest"] for row in rows])

    cuts = {
        "whole/a": range(6), "cut/a": range(2, 6), "cut/b": range(2), "other/a": range(1, 7),
        "twice/a": [0, *range(6)],
    }  # fmt: skip
    for name, seeds in cuts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / f"{name}.tar", [Sample(f"k{i}", photo(seed)) for i, seed in enumerate(seeds)])
    assert digest("cut") == digest("whole")
    assert len({digest("whole"), digest("other"), digest("twice"), digest("whole", size_px=36)}) == 4


def test_shape_is_part_of_an_images_digest() -> None:
    assert pixel_digest(np.zeros((2, 3, 3), np.uint8)) != pixel_digest(np.zeros((3, 2, 3), np.uint8))


def test_an_id_reads_back() -> None:
    image = ImageId("folder/with a slash", 12)
    assert ImageId.parse(str(image)) == image
