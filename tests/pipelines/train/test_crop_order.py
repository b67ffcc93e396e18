"""The order of crops entered anywhere: the rows that a walk from the beginning finds there."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from pipelines.shards import Sample, write_tar
from pipelines.train.crop_order import (
    WINDOW_BATCHES,
    CropOrder,
    crop_dataset,
    crops_of_span,
    shuffled_batches,
)
from pipelines.train.crops import CropConfig

# Of a photo of 40×32 pixels: not in every pass the same number.
CROPS_PER_PHOTO = 2.3
BATCH = 2
WINDOW_ROWS = WINDOW_BATCHES * BATCH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photo: Callable[[int], bytes]) -> Path:
    """Three shards, of 4, 1 and 0 photos."""
    folder = tmp_path_factory.mktemp("shards")
    write_tar(folder / "a.tar", [Sample(f"k{i}", photo(i)) for i in range(4)])
    write_tar(folder / "b.tar", [Sample("k9", photo(9)), Sample("text", b"\xff\xd8text")])
    write_tar(folder / "c.tar", [Sample("none", None, {"json": b"{}"})])
    return folder


def order_of(folder: Path, crops_per_photo: float) -> CropOrder:
    config = CropConfig(crop_px=8, crops_per_megapixel=crops_per_photo / (40 * 32 / 1e6), seed=3)
    return CropOrder.of(str(folder), config)


@pytest.fixture(scope="module")
def order(folder: Path) -> CropOrder:
    return order_of(folder, CROPS_PER_PHOTO)


def rows_of(order: CropOrder, first: int, stop: int) -> list[bytes]:
    found = [
        crop["image"].tobytes()
        for span in order.spans(first, stop)
        for crop in crops_of_span(span, order.config)
    ]
    assert len(found) >= stop - first
    return found[: stop - first]


def test_it_can_be_entered_at_any_row(order: CropOrder) -> None:
    whole = rows_of(order, 0, 60)
    for first in range(0, 59, 7):
        assert rows_of(order, first, 60) == whole[first:]
    assert len(set(whole)) == 60


def test_entering_far_on_reads_no_more_than_a_pass_too_much(order: CropOrder) -> None:
    spans = order.spans(10_000_000, 10_000_001)
    assert len(spans) <= 2
    assert sum(span["skip"] for span in spans) < 5 * (CROPS_PER_PHOTO + 1)
    assert abs(spans[0]["pass_index"] - 10_000_000 / (5 * CROPS_PER_PHOTO)) < 2


def test_a_pass_has_each_picture_and_another_order_of_shards(order: CropOrder) -> None:
    spans = order.spans(0, 2000)
    shards = [span["shard"].name for span in spans]
    assert set(shards) == {"a", "b"}
    assert len({tuple(shards[i : i + 2]) for i in range(0, len(shards) - 1, 2)}) == 2


def windows(count: int) -> list[np.ndarray]:
    pixels = (
        np.arange(count * WINDOW_ROWS, dtype=np.uint32).view(np.uint8).reshape(count, WINDOW_ROWS, 2, 2, 1)
    )
    return list(np.repeat(pixels, 3, axis=-1))


def test_a_window_is_shuffled_by_seed_number_and_rank() -> None:
    def first_batches(seed: int, rank: int, after_step: int = 0) -> np.ndarray:
        start = windows(2)[after_step // WINDOW_BATCHES :]
        batches = shuffled_batches(start, seed=seed, rank=rank, after_step=after_step)
        return np.stack([batch.numpy() for batch in islice(batches, 2 * WINDOW_BATCHES - after_step)])

    whole = first_batches(0, 0)
    for after_step in (1, 63, 64, 100):
        np.testing.assert_array_equal(first_batches(0, 0, after_step), whole[after_step:])
    for other in (first_batches(1, 0), first_batches(0, 1)):
        assert not np.array_equal(other, whole)
    for window in (whole[:WINDOW_BATCHES], whole[WINDOW_BATCHES:]):
        assert len(np.unique(window.reshape(WINDOW_ROWS, -1), axis=0)) == WINDOW_ROWS


def test_crops_that_run_out_are_told() -> None:
    batches = shuffled_batches(windows(1), seed=0, rank=0, after_step=0)
    with pytest.raises(UserError, match="fewer crops than were counted"):
        list(batches)


@pytest.mark.usefixtures("ray_cluster")
def test_ray_deals_the_same_rows_to_a_run_that_goes_on(folder: Path) -> None:
    """Eight batches to one worker, eight to the other; from a window's beginning as from the start."""
    import ray
    from ray.data import ExecutionOptions

    order = order_of(folder, 47.3)

    @ray.remote(num_cpus=0)
    def read(split: ray.data.DataIterator) -> list[bytes]:
        batches = split.iter_batches(batch_size=WINDOW_ROWS // 2, batch_format="numpy", drop_last=True)
        return [crop.tobytes() for batch in batches for crop in batch["image"]]

    def rows_after(step: int) -> list[list[bytes]]:
        dataset = crop_dataset(
            order, after_step=step, num_steps=2 * WINDOW_BATCHES, batch_size=BATCH, num_workers=2
        )
        dataset.context.execution_options = ExecutionOptions(preserve_order=True)
        found: list[list[bytes]] = ray.get([read.remote(s) for s in dataset.streaming_split(2, equal=True)])
        return found

    blocks = np.array(rows_of(order, 0, 2 * WINDOW_ROWS), object).reshape(-1, 8)
    expected = [blocks[worker::2].ravel().tolist() for worker in (0, 1)]
    assert [rows[:WINDOW_ROWS] for rows in rows_after(0)] == expected
    half = WINDOW_ROWS // 2
    assert [rows[:half] for rows in rows_after(WINDOW_BATCHES + 5)] == [rows[half:] for rows in expected]
