"""Which row groups a latent dataset has, per bucket: from its manifest and header, no data file is opened."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ldm.errors import UserError
from ldm.seeds import keyed_seed
from pipelines.dataset import LatentDataset
from pipelines.latent_table import rows_per_group

__all__ = ["BucketCatalog", "hold_out", "open_catalog"]

# Validation rows come from at most this many row groups, since each of them is read for it.
MAX_VALIDATION_GROUPS = 64
MAX_VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class BucketCatalog:
    """The row groups of one bucket.

    shape: (C, h, w) of its latents; paths: inside the dataset; file_G, index_G, rows_G: int64, of every
    row group its file, its number there, and its rows.
    """

    name: str
    shape: tuple[int, int, int]
    paths: tuple[str, ...]
    file_G: NDArray[np.int64]
    index_G: NDArray[np.int64]
    rows_G: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return int(self.rows_G.sum())


def open_catalog(dataset: LatentDataset, size_px: int | None) -> tuple[BucketCatalog, ...]:
    """Buckets of images of ``size_px``, sorted by name.

    size_px: one of the dataset's sizes; None where it has one only. UserError where there are several,
    where there is no such size, and as `LatentDataset.manifest` raises it.
    """
    sizes = dataset.header.preprocess.sizes_px
    if size_px is None and len(sizes) > 1:
        raise UserError(
            f"{dataset.url} holds images of several sizes",
            do=f"choose one: --train.data.size-px {sizes[0]}",
            allowed=", ".join(map(str, sizes)),
        )
    chosen = size_px or sizes[0]
    if chosen not in sizes:
        raise UserError(f"{dataset.url} has no images of size {chosen}", allowed=", ".join(map(str, sizes)))
    manifest = dataset.manifest()
    names = sorted(name for name in set(manifest["bucket"].to_pylist()) if _size_of(name, chosen) == chosen)
    return tuple(_bucket(dataset, manifest, name) for name in names)


def _size_of(bucket: str, default_px: int) -> int:
    """The size in a bucket's name, as 256 in ``256px-320x192``."""
    head, mark, _ = bucket.partition("px-")
    return int(head) if mark else default_px


def _bucket(dataset: LatentDataset, manifest: pa.Table, name: str) -> BucketCatalog:
    header = dataset.header
    files = manifest.filter(pa.compute.equal(manifest["bucket"], name))
    width_px, height_px = (int(side) for side in name.rpartition("px-")[2].split("x"))
    shape = header.channels, height_px // header.f, width_px // header.f
    per_group = rows_per_group(header.form, shape)
    rows_F = files["rows"].to_numpy()
    groups_F = -(-rows_F // per_group)
    file_G = np.repeat(np.arange(len(rows_F)), groups_F)
    index_G = np.arange(len(file_G)) - np.repeat(np.cumsum(groups_F) - groups_F, groups_F)
    rows_G = np.minimum(per_group, rows_F[file_G] - index_G * per_group)
    return BucketCatalog(name, shape, tuple(files["path"].to_pylist()), file_G, index_G, rows_G)


def hold_out(buckets: Sequence[BucketCatalog], num_rows: int, seed: int) -> list[NDArray[np.int64]]:
    """For each bucket, how many rows at the start of each row group are held out for validation.

    At most ``num_rows`` in all, and 5 % of a bucket; a function of the catalog and ``seed`` alone.
    """
    total = sum(bucket.num_rows for bucket in buckets)
    held = []
    for bucket in buckets:
        wanted = min(num_rows * bucket.num_rows // total, int(bucket.num_rows * MAX_VALIDATION_SHARE))
        held.append(_hold_out(bucket.rows_G, wanted, keyed_seed("held out", seed, bucket.name)))
    return held


def _hold_out(rows_G: NDArray[np.int64], wanted: int, seed: int) -> NDArray[np.int64]:
    held_G = np.zeros_like(rows_G)
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(rows_G))[:MAX_VALIDATION_GROUPS]
    share = min(1.0, wanted / max(1, int(rows_G[chosen].sum())))
    # Cumulative rounding: the parts add up to what is wanted.
    ends = np.floor(np.cumsum(rows_G[chosen]) * share + 1e-9).astype(np.int64)
    held_G[chosen] = np.diff(ends, prepend=0)
    return held_G
