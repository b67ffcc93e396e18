"""The latents of a dataset that have an attribute, and those that have not: by class, or by caption.

Of each side at most a given number is kept, those with the smallest keyed hashes: a choice that does
not depend on the order of the rows.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ldm.conditioning import ClassConditioner
from ldm.errors import UserError
from ldm.seeds import keyed_seed
from pipelines.dataset import LatentDataset
from pipelines.latent_table import LatentRows, read_latents

__all__ = ["AttributeRows", "By", "attribute_rows"]

By = Literal["label", "caption"]
# (row's label, its caption) → True with the attribute, False without, None neither
Judge = Callable[[int | None, str | None], bool | None]


@dataclass(frozen=True)
class AttributeRows:
    """Keys and latents (N, C, h, w), float32, of one side, in order of their hashes."""

    keys: list[str]
    latents_NChw: NDArray[np.float32]


@dataclass
class _Kept:
    """The rows of one side with the smallest hashes seen so far."""

    limit: int
    rows: list[tuple[int, str, NDArray[np.float16]]] = field(default_factory=list)

    def add(self, key: str, latent_Chw: NDArray[np.float16]) -> None:
        self.rows.append((keyed_seed("direction", key), key, latent_Chw))
        if len(self.rows) >= 2 * self.limit:
            self._prune()

    def _prune(self) -> None:
        self.rows.sort(key=lambda row: row[:2])
        del self.rows[self.limit :]

    def result(self) -> AttributeRows:
        self._prune()
        return AttributeRows(
            [key for _, key, _ in self.rows], np.stack([z for *_, z in self.rows]).astype(np.float32)
        )


def attribute_rows(
    dataset: LatentDataset, attribute: str, against: str, by: By, max_rows: int, bucket: str = ""
) -> tuple[AttributeRows, AttributeRows]:
    """(with, without) an attribute: a class, by name or index, or a word of the captions.

    against: another of the same kind; all that is not ``attribute`` where it is empty. bucket: the shape
    to take, such as 64x64; needed where the dataset has several. UserError for a dataset without labels
    or captions, an attribute that is not in it, and one that leaves a side empty.
    """
    judge = _by_label(dataset, attribute, against) if by == "label" else _by_word(attribute, against)
    has, has_not = _Kept(max_rows), _Kept(max_rows)
    captioned = False
    for rows in _of_one_bucket(dataset, bucket):
        captioned |= any(rows.captions)
        for i, key in enumerate(rows.keys):
            side = judge(rows.labels[i], rows.captions[i])
            if side is not None:
                (has if side else has_not).add(key, rows.moments.mean_NChw[i])
    if by == "caption" and not captioned:
        raise UserError(f"latent dataset {dataset.url} has no captions", do="use --by label")
    _check_side(has, f"with {attribute!r}", dataset)
    _check_side(has_not, f"with {against!r}" if against else f"without {attribute!r}", dataset)
    return has.result(), has_not.result()


def _check_side(kept: _Kept, said: str, dataset: LatentDataset) -> None:
    if not kept.rows:
        raise UserError(f"latent dataset {dataset.url} has no row {said}", do="choose another attribute")


def _by_label(dataset: LatentDataset, attribute: str, against: str) -> Judge:
    names = dataset.header.class_names
    if names is None:
        raise UserError(f"latent dataset {dataset.url} has no labels", do="use --by caption")
    wanted = ClassConditioner(names).encode([attribute, against or None]).class_labels
    assert wanted is not None
    positive, negative = wanted.tolist()

    def judge(label: int | None, caption: str | None) -> bool | None:
        if label is None:
            return None
        return True if label == positive else (None if against and label != negative else False)

    return judge


def _by_word(attribute: str, against: str) -> Judge:
    positive, negative = (
        re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE) for word in (attribute, against)
    )

    def judge(label: int | None, caption: str | None) -> bool | None:
        if caption is None:
            return None
        if positive.search(caption):
            # With both words it is an example of neither.
            return None if against and negative.search(caption) else True
        return None if against and not negative.search(caption) else False

    return judge


def _of_one_bucket(dataset: LatentDataset, bucket: str) -> Iterator[LatentRows]:
    """The data files of one shape."""
    entries = dataset.derived().manifest.to_pylist()
    buckets = Counter(entry["bucket"] for entry in entries)
    if not bucket and len(buckets) > 1:
        largest = max(buckets, key=lambda name: buckets[name])
        raise UserError(
            f"latent dataset {dataset.url} has images of several sizes", do=f"give --bucket {largest}"
        )
    if bucket and bucket not in buckets:
        raise UserError(f"no bucket {bucket!r} in {dataset.url}", allowed=", ".join(sorted(buckets)))
    for entry in entries:
        if not bucket or entry["bucket"] == bucket:
            with dataset.filesystem.open(dataset.path(entry["path"]), "rb") as file:
                yield read_latents(file)
