"""What each form of storage costs: bytes of an image, and what is lost in the decoded picture."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ldm.autoencoder import Autoencoder
from ldm.metrics import psnr
from pipelines.encode.encoder import stored_moments
from pipelines.latent_table import LatentRows, MomentArrays, data_bytes
from pipelines.storage_form import StorageForm

__all__ = ["FormCost", "form_costs"]


class FormCost(NamedTuple):
    """bytes_per_image: in a data file. psnr_db: decoded, against the decoded mean; None: the very same."""

    stored: str
    dtype: str
    bytes_per_image: float
    psnr_db: float | None


def form_costs(rows: LatentRows, autoencoder: Autoencoder, images: int) -> Iterator[FormCost]:
    """Every form of rows that hold moments; ``images`` of them are decoded."""
    means, stds = (torch.from_numpy(moments.astype(np.float32)) for moments in rows.moments)
    exact = [_picture(autoencoder, mean) for mean in means[:images]]
    for stored, dtype in itertools.product(("moments", "mode", "sample"), ("float16", "int8")):
        form = StorageForm(stored=stored, dtype=dtype)
        pairs = [
            stored_moments((mean, std), form, key, 0)
            for mean, std, key in zip(means, stds, rows.keys, strict=True)
        ]
        moments = MomentArrays(*(np.stack(values) for values in zip(*pairs, strict=True)))
        size = len(data_bytes(replace(rows, moments=moments, mirrored=None), form))
        found = [_picture(autoencoder, torch.from_numpy(mean).float()) for mean in moments.mean_NChw[:images]]
        psnr_db = float(torch.stack([psnr(*pair)[0] for pair in zip(found, exact, strict=True)]).mean())
        yield FormCost(stored, dtype, size / len(rows.keys), psnr_db if math.isfinite(psnr_db) else None)


def _picture(autoencoder: Autoencoder, latent_Chw: torch.Tensor) -> torch.Tensor:
    """float (1, 3, H, W) in [0, 1]."""
    return autoencoder.decode(latent_Chw[None]).float().add(1).div(2).clamp(0, 1)
