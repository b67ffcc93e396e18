"""Pairs for an upsampler: beside every row that of the same image at a lower size.

ENCODE writes the views of a unit's images into one file for each size and shape, in the order of the images,
and an image that cannot be stored at one size is left out of all. So row i of a bucket and row i of its
counterpart are of one image. They are read by position, and their keys are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import UserError
from pipelines.dataset import LatentDataset
from pipelines.train.catalog import BucketCatalog, open_catalog
from pipelines.train.order import Span
from pipelines.train.row_groups import RowGroupReader, Rows

__all__ = ["LowDraw", "LowLatents", "PairReader", "draw_low", "low_buckets", "sample_low"]


@dataclass(frozen=True)
class LowLatents:
    """The low-resolution side of a batch.

    z_BChw: float32, sampled from the posterior, in the VAE's own scale; noise_BChw: standard normal, to
    augment it with; u_B: float32 in [0, 1), for the level of that noise.
    """

    z_BChw: Tensor
    noise_BChw: Tensor
    u_B: Tensor

    def __getitem__(self, rows: slice) -> "LowLatents":
        return LowLatents(self.z_BChw[rows], self.noise_BChw[rows], self.u_B[rows])


class LowDraw(NamedTuple):
    """What is random about the low-resolution side of one row."""

    posterior_Chw: NDArray[np.float32]
    noise_Chw: NDArray[np.float32]
    u: float


def draw_low(rng: np.random.Generator, shape_Chw: tuple[int, ...]) -> LowDraw:
    """To be drawn after all else of a row, which is then the same as without pairs."""
    posterior, noise = rng.standard_normal((2, *shape_Chw), np.float32)
    return LowDraw(posterior, noise, rng.random())


def sample_low(rows: Rows, flip_N: NDArray[np.bool_], drawn: Sequence[LowDraw]) -> LowLatents:
    """Low-resolution rows as latents, mirrored where the high-resolution ones are."""
    mean, std = (torch.from_numpy(moment).float() for moment in rows.sides(flip_N))
    posterior, noise, u = zip(*drawn, strict=True)
    return LowLatents(
        z_BChw=mean + std * torch.from_numpy(np.stack(posterior)),
        noise_BChw=torch.from_numpy(np.stack(noise)),
        # In single precision a value just below 1 would be rounded to it.
        u_B=torch.tensor(u, dtype=torch.float32).clamp(max=1 - 2**-24),
    )


def low_buckets(
    dataset: LatentDataset, buckets: Sequence[BucketCatalog], size_px: int | None, low_size_px: int
) -> dict[str, BucketCatalog]:
    """Name of each of the ``buckets``, which are of ``size_px`` → the bucket of the same images, but smaller.

    UserError where the dataset has no such low size, where ``size_px`` is not 2, 3, … times as large, and
    where a bucket has no counterpart of latents as many times smaller, with the same units and rows.
    """
    by_shape = {low.shape: low for low in open_catalog(dataset, low_size_px)}
    chosen = size_px or dataset.header.preprocess.sizes_px[0]
    factor = chosen // low_size_px
    if factor < 2 or chosen % low_size_px:
        raise UserError(
            f"size {chosen} is no whole multiple of the low size {low_size_px}",
            allowed="2, 3, … times the low size",
            do="choose others for --train.data.size-px and --train.data.low-size-px",
        )
    pairs = {}
    for high in buckets:
        channels, height, width = high.shape
        low = by_shape.get((channels, height // factor, width // factor))
        if low is None or height % factor or width % factor:
            raise UserError(
                f"bucket {high.name} has {height}×{width} latents, and no bucket of size {low_size_px} has "
                f"latents {factor} times smaller",
                do=f"encode with sizes that are multiples of {dataset.header.f}, the VAE's factor",
            )
        _check_files(high, low)
        pairs[high.name] = low
    return pairs


def _check_files(high: BucketCatalog, low: BucketCatalog) -> None:
    files, low_files = _rows_by_file(high), _rows_by_file(low)
    if files != low_files:
        file = min(dict(files.items() ^ low_files.items()))
        raise UserError(
            f"{file} has {files.get(file, 0)} rows in bucket {high.name} and {low_files.get(file, 0)} in "
            f"{low.name}",
            do="run ldm verify, and encode again",
        )


def _rows_by_file(bucket: BucketCatalog) -> dict[str, int]:
    rows_F = np.zeros(len(bucket.paths), np.int64)
    np.add.at(rows_F, bucket.file_G, bucket.rows_G)
    names = (path.rsplit("/", 1)[-1] for path in bucket.paths)
    return dict(zip(names, rows_F.tolist(), strict=True))


class PairReader:
    """Reads row groups of a bucket and, for each, the rows of the same images in its counterpart.

    Both catalogs have the same files, in the manifest's order of units. So a row has the same number in both,
    counted through the bucket. May be called from several threads.
    """

    def __init__(self, dataset: LatentDataset, high: BucketCatalog, low: BucketCatalog) -> None:
        self.high = RowGroupReader(dataset, high)
        self.low = RowGroupReader(dataset, low, with_text=False)
        self.starts_G = np.cumsum(high.rows_G) - high.rows_G
        self.low_ends_G = np.cumsum(low.rows_G)

    def read(self, spans: Sequence[Span]) -> Rows:
        """As `RowGroupReader.read`, with ``low``. UserError where the keys of a pair differ."""
        return Rows.concat([self._read_span(span) for span in spans])

    def _read_span(self, span: Span) -> Rows:
        rows = self.high.read([span])
        start = int(self.starts_G[span.group])
        low_spans = self._low_spans(start + span.start, start + span.stop)
        low = self.low.read(low_spans)
        different = np.flatnonzero(rows.keys_N != low.keys_N)
        if len(different):
            first = different[0]
            raise UserError(
                f"{self.low.path(low_spans[0].group)} has key {low.keys_N[first]} where "
                f"{self.high.path(span.group)} has {rows.keys_N[first]}",
                do="run ldm verify, and encode again",
            )
        return replace(rows, low=low)

    def _low_spans(self, start: int, stop: int) -> list[Span]:
        """Where the low-resolution rows ``start`` to ``stop``, counted through the bucket, lie."""
        groups = range(
            int(np.searchsorted(self.low_ends_G, start, side="right")),
            int(np.searchsorted(self.low_ends_G, stop, side="left")) + 1,
        )
        spans = []
        for group in groups:
            end, num_rows = int(self.low_ends_G[group]), int(self.low.bucket.rows_G[group])
            spans.append(Span(group, max(0, start - end + num_rows), num_rows - max(0, end - stop)))
        return spans
