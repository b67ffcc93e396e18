"""The order of a training's crops, which can be entered at any step without a look at those before it.

Rows of the endless sequence of crops are counted from 0: pass after pass over the input, in each every
shard once. How many crops an image has given before a pass is a formula (`crops_before`), so the row where
a run goes on is found by bisection. Ray Data makes the crops from there in this order, in blocks of equally
many rows, which it deals to the workers in turn; a worker shuffles whole windows of its batches.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import UserError
from ldm.image_tensors import to_model
from ldm.seeds import keyed_seed
from pipelines.shards import Shard, list_shards
from pipelines.train.crops import CropConfig, crop_rate, crops, crops_before, usable_images

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = [
    "WINDOW_BATCHES",
    "CropOrder",
    "crop_dataset",
    "crops_of_span",
    "shuffled_batches",
    "window_of",
]

# Batches that a worker shuffles together. A run goes on from the beginning of a window.
WINDOW_BATCHES = 64
# Batches of a worker in one block. It divides a window, so that windows begin with the first worker's block.
BLOCK_BATCHES = 8


@dataclass(frozen=True)
class CropOrder:
    """Which crops there are in which pass: rates of each shard's N usable images, (N, 2) float64."""

    config: CropConfig
    shards: tuple[Shard, ...]
    rates: tuple[NDArray[np.float64], ...]

    @classmethod
    def of(cls, source: str, config: CropConfig) -> "CropOrder":
        """Of an input, every image of which is decoded."""
        shards = tuple(list_shards(source))
        rates = tuple(
            np.array([crop_rate(s, *found, config) for found in usable_images(s)]).reshape(-1, 2)
            for s in shards
        )
        return cls(config, shards, rates)

    def spans(self, first: int, stop: int) -> list[dict[str, Any]]:
        """What to crop for the rows from ``first`` to ``stop``: shard, pass, and crops of it to leave out.

        The last pass is whole, so there may be more rows than asked for.
        """
        start_pass, last_pass = self._pass_of(first), self._pass_of(stop - 1)
        skip = first - sum(self._rows_before(start_pass))
        found = []
        for pass_index in range(start_pass, last_pass + 1):
            counts = np.subtract(self._rows_before(pass_index + 1), self._rows_before(pass_index))
            for i in np.random.default_rng(self._seed(pass_index)).permutation(len(self.shards)):
                if skip < counts[i]:
                    found.append({"shard": self.shards[i], "pass_index": pass_index, "skip": skip})
                skip = max(0, skip - int(counts[i]))
        return found

    def _pass_of(self, row: int) -> int:
        passes = 1
        while sum(self._rows_before(passes)) <= row:
            passes *= 2
        return bisect_right(range(passes + 1), row, key=lambda p: sum(self._rows_before(p))) - 1

    def _rows_before(self, pass_index: int) -> list[int]:
        return [int(crops_before(pass_index, *rates.T).sum()) for rates in self.rates]

    def _seed(self, pass_index: int) -> int:
        return keyed_seed("shards", self.config.seed, pass_index)


def window_of(step: int) -> int:
    """The window, counted from 0, in which the step after ``step`` finds its batch."""
    return step // WINDOW_BATCHES


def crop_dataset(
    order: CropOrder, *, after_step: int, num_steps: int, batch_size: int, num_workers: int
) -> "Dataset":
    """The crops (column ``image``) of all windows from that of the step after ``after_step`` on, lazily.

    num_steps: of the whole run; batch_size: crops per step over all workers.
    """
    import ray

    window_rows = WINDOW_BATCHES * batch_size
    first = window_of(after_step) * window_rows
    spans = order.spans(first, (window_of(num_steps - 1) + 1) * window_rows)
    return (
        ray.data.from_items(spans, override_num_blocks=len(spans))
        .flat_map(lambda span: crops_of_span(span, order.config))
        .repartition(target_num_rows_per_block=BLOCK_BATCHES * batch_size // num_workers, strict=True)
    )


def crops_of_span(span: dict[str, Any], config: CropConfig) -> Iterator[dict[str, Any]]:
    """The crops that one of `CropOrder.spans` stands for."""
    return islice(crops(span["shard"], span["pass_index"], config), span["skip"], None)


def shuffled_batches(
    windows: Iterable[NDArray[np.uint8]], *, seed: int, rank: int, after_step: int
) -> Iterator[Tensor]:
    """A worker's batches (B, 3, H, W) in [-1, 1] for the steps after ``after_step``.

    windows: (WINDOW_BATCHES · B, H, W, 3) each, the first that of `window_of` ``after_step``.
    """
    for window, images in enumerate(windows, window_of(after_step)):
        rng = np.random.default_rng(keyed_seed("window", seed, window, rank))
        rows = rng.permutation(len(images)).reshape(WINDOW_BATCHES, -1)
        for chosen in rows[max(0, after_step - window * WINDOW_BATCHES) :]:
            yield to_model(images[chosen])
    raise UserError("the input has fewer crops than were counted", do="do not change it while it is read")
