"""Rows as the loader holds them, and how a row group becomes some."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ldm.errors import UserError
from pipelines.dataset import LatentDataset
from pipelines.latent_table import LatentRows, MomentArrays, read_latents
from pipelines.text_table import read_text
from pipelines.train.catalog import BucketCatalog
from pipelines.train.order import Span

__all__ = ["RowGroupReader", "Rows"]


@dataclass(frozen=True)
class Rows:
    """Rows of one bucket, N of them.

    keys_N: object (str); labels_N: int64, -1 where a row has none; embeddings_N: object, float16 (L, D)
    or None; mirrored: None where the dataset has no mirrored latents; low: rows of the same images at a
    lower size, for an upsampler.
    """

    keys_N: NDArray[np.object_]
    labels_N: NDArray[np.int64]
    embeddings_N: NDArray[np.object_]
    moments: MomentArrays
    mirrored: MomentArrays | None
    low: "Rows | None" = None

    def __len__(self) -> int:
        return len(self.keys_N)

    @property
    def shape_Chw(self) -> tuple[int, ...]:
        return self.moments.mean_NChw.shape[1:]

    def take(self, index: "slice | NDArray[np.int64]") -> "Rows":
        """Some of the rows, in the order of ``index``."""
        mirrored = None if self.mirrored is None else MomentArrays(*(m[index] for m in self.mirrored))
        return Rows(
            self.keys_N[index],
            self.labels_N[index],
            self.embeddings_N[index],
            MomentArrays(*(m[index] for m in self.moments)),
            mirrored,
            None if self.low is None else self.low.take(index),
        )

    def sides(self, flip_N: NDArray[np.bool_]) -> MomentArrays:
        """The moments, mirrored where ``flip_N``, if the dataset has them mirrored."""
        if self.mirrored is None:
            return self.moments
        flip = flip_N[:, None, None, None]
        pairs = zip(self.moments, self.mirrored, strict=True)
        return MomentArrays(*(np.where(flip, mirrored, plain) for plain, mirrored in pairs))

    @staticmethod
    def concat(parts: Sequence["Rows"]) -> "Rows":
        """All rows one after another."""
        if len(parts) == 1:
            return parts[0]
        mirrored = [part.mirrored for part in parts if part.mirrored is not None]
        low = [part.low for part in parts if part.low is not None]
        return Rows(
            np.concatenate([part.keys_N for part in parts]),
            np.concatenate([part.labels_N for part in parts]),
            np.concatenate([part.embeddings_N for part in parts]),
            _concat([part.moments for part in parts]),
            _concat(mirrored) if mirrored else None,
            Rows.concat(low) if low else None,
        )


def _concat(parts: Sequence[MomentArrays]) -> MomentArrays:
    mean, std = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return MomentArrays(mean, std)


class RowGroupReader:
    """Reads row groups of one bucket; may be called from several threads."""

    def __init__(self, dataset: LatentDataset, bucket: BucketCatalog, *, with_text: bool = True) -> None:
        self.dataset, self.bucket = dataset, bucket
        self.has_text = with_text and dataset.header.text is not None
        self.by_key = self.has_text and dataset.header.text.config.precomputed is not None  # type: ignore[union-attr]

    def read(self, spans: Sequence[Span]) -> Rows:
        """The rows of the spans, one after another. UserError for a file that is missing or damaged."""
        return Rows.concat([self._read_span(span) for span in spans])

    def path(self, group: int) -> str:
        """The file of a row group, inside the dataset."""
        return self.bucket.paths[int(self.bucket.file_G[group])]

    def _read_span(self, span: Span) -> Rows:
        path = self.path(span.group)
        try:
            with self.dataset.filesystem.open(self.dataset.path(path), "rb") as stream:
                found = read_latents(stream, [int(self.bucket.index_G[span.group])])
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing", do="run ldm verify, and encode again") from error
        except (OSError, pa.ArrowException, IndexError) as error:
            raise UserError(
                f"{path} cannot be read: {str(error).splitlines()[0]}", do="run ldm verify"
            ) from error
        if len(found.keys) != self.bucket.rows_G[span.group]:
            raise UserError(
                f"{path} has row groups of another size than this version writes",
                do="encode again",
            )
        embeddings_N = self._embeddings(path, found)
        rows = Rows(
            np.array(found.keys, dtype=object),
            np.array([-1 if label is None else label for label in found.labels], np.int64),
            embeddings_N,
            found.moments,
            found.mirrored,
        )
        return rows.take(slice(span.start, span.stop))

    def _embeddings(self, data_path: str, found: LatentRows) -> NDArray[np.object_]:
        embeddings_N: NDArray[Any] = np.full(len(found.keys), None, dtype=object)
        texts = found.keys if self.by_key else found.captions
        if not self.has_text or all(text is None for text in texts):
            return embeddings_N
        text_path = self.dataset.path("text", data_path.rsplit("/", 1)[-1])
        with self.dataset.filesystem.open(text_path, "rb") as stream:
            stored = read_text(stream)
        for row, text in enumerate(texts):
            if text is not None:
                # A copy: the one row must not keep the whole unit's embeddings alive.
                embeddings_N[row] = stored[text].copy()
        return embeddings_N
