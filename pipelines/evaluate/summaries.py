"""From features in the columns of a Ray dataset to one summary of each column."""

import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ldm.feature_stats import FeatureSummary
from pipelines.evaluate.images import ImageId

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["summarise"]

# A state of 2048 features is 34 MB whatever it is the state of, so it stands for many images.
IMAGES_PER_STATE = 2048

Columns = dict[str, NDArray[Any]]


def summarise(dataset: "Dataset", columns: Sequence[str], keep: int) -> dict[str, FeatureSummary]:
    """Column → summary over the rows without a ``reason``; keep: images in the sample.

    Tasks summarise parts, and this process merges them one by one: it never holds the features.
    """
    merged: dict[str, FeatureSummary] = {}
    parts = dataset.map_batches(lambda batch: _partial(batch, columns, keep), batch_size=IMAGES_PER_STATE)
    for row in parts.iter_rows():
        for name in columns:
            part: FeatureSummary = pickle.loads(row[name])  # our own task's: no bytes from outside
            merged[name] = merged[name].merge(part) if name in merged else part
    return merged


def _partial(batch: Columns, columns: Sequence[str], keep: int) -> Columns:
    good = batch["reason"] == ""
    names = zip(batch["shard"][good], batch["position"][good], strict=True)
    ids = [str(ImageId(str(shard), int(position))) for shard, position in names]
    states = {name: pickle.dumps(FeatureSummary.of(keep, ids, batch[name][good])) for name in columns}
    return {name: np.array([state], dtype=object) for name, state in states.items()}
