"""Latents for training, in an order that is a pure function of (seed, epoch, global batch index).

First cut: all rows of the dataset are held in memory, in fp16 (1 kB a row for 8×8×4 latents).
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import UserError
from ldm.latents import Moments, keyed_normal
from ldm.seeds import keyed_seed
from pipelines.dataset import LatentDataset
from pipelines.latent_table import read_latents

__all__ = ["LatentBatch", "LatentRows", "batches", "check_batch_size", "load_rows", "row_order"]


@dataclass(frozen=True)
class LatentRows:
    """All rows of a dataset, in unit order. labels_N: int64, -1 where a row has none."""

    keys: tuple[str, ...]
    labels_N: NDArray[np.int64]
    mean_NChw: NDArray[np.float16]
    std_NChw: NDArray[np.float16]


@dataclass(frozen=True)
class LatentBatch:
    """One rank's share of a global batch; z_BChw in the VAE's scale, float32, freshly sampled.

    positions_B: each row's place in the whole run (global batch index · batch size + row), the key
    of everything random that happens to it.
    """

    z_BChw: Tensor
    labels_B: Tensor
    positions_B: tuple[int, ...]


def load_rows(dataset: LatentDataset) -> LatentRows:
    """Read every committed file and check its SHA-256.

    UserError where a file is missing or damaged, where there is no row, or where images of several
    sizes are in the dataset.
    """
    parts = []
    for entry in dataset.derived().manifest.to_pylist():
        try:
            data = dataset.filesystem.cat_file(dataset.path(entry["path"]))
        except FileNotFoundError as error:
            raise UserError(
                f"{entry['path']} of unit {entry['unit']} is missing", do="encode again"
            ) from error
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise UserError(
                f"{entry['path']} is damaged: its SHA-256 is not the committed one",
                do=f"remove commits/{entry['unit']}.json and encode again",
            )
        parts.append(read_latents(io.BytesIO(data)))
    if not parts:
        raise UserError(f"latent dataset {dataset.url} has no rows", do="see its quarantine folder")
    shapes = {part.moments.mean_NChw.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise UserError(f"latents of several sizes in {dataset.url}: {sorted(shapes)}", allowed="one size")
    labels = [-1 if label is None else label for part in parts for label in part.labels]
    return LatentRows(
        tuple(key for part in parts for key in part.keys),
        np.array(labels, np.int64),
        np.concatenate([part.moments.mean_NChw for part in parts]),
        np.concatenate([part.moments.std_NChw for part in parts]),
    )


def row_order(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    """The permutation of one epoch."""
    return np.random.Generator(np.random.Philox(keyed_seed("order", seed, epoch))).permutation(num_rows)


def check_batch_size(num_rows: int, batch_size: int) -> None:
    """UserError where an epoch has no whole batch."""
    if batch_size > num_rows:
        raise UserError(f"{num_rows} latents cannot fill a batch of {batch_size}", allowed=f"1 to {num_rows}")


def batches(
    rows: LatentRows, *, seed: int, batch_size: int, rank: int, world: int, first: int = 0
) -> Iterator[LatentBatch]:
    """Endless batches from global batch ``first`` on; rank r of w gets rows r, r + w, … of each.

    An epoch's last rows that do not fill a batch are left out of that epoch. Every worker count
    therefore sees the same global batches. The posterior is sampled afresh, seeded by (epoch, key).
    """
    num_rows = len(rows.keys)
    check_batch_size(num_rows, batch_size)
    per_epoch = num_rows // batch_size
    index, epoch, order = first, -1, np.empty(0, np.int64)
    while True:
        if index // per_epoch != epoch:
            epoch = index // per_epoch
            order = row_order(seed, epoch, num_rows)
        within = np.arange(rank, batch_size, world)
        chosen = order[index % per_epoch * batch_size + within]
        yield LatentBatch(
            _sample(rows, chosen, seed, epoch),
            torch.from_numpy(rows.labels_N[chosen]),
            tuple((index * batch_size + within).tolist()),
        )
        index += 1


def _sample(rows: LatentRows, chosen: NDArray[np.int64], seed: int, epoch: int) -> Tensor:
    mean, std = (torch.from_numpy(a[chosen]).float() for a in (rows.mean_NChw, rows.std_NChw))
    seeds = [keyed_seed("posterior", seed, epoch, rows.keys[row]) for row in chosen]
    return Moments(mean, std).sample(keyed_normal(seeds, mean.shape[1:]))
