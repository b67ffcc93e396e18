"""A latent becomes an image file: how every job decodes one large image."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cluster import ClusterConfig, connected
from ldm.errors import UserError
from ldm.tiling.config import Tiling
from pipelines.tile_actors import TileActors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ldm.autoencoder import Autoencoder
    from ldm.tiling.exact import Rows

__all__ = ["require_room", "write_decoded"]

# Standard deviation of latents whitened by the VAE's config: 1 over many photographs.
MIN_STD, MAX_STD = 0.3, 3.0
ROWS_AT_A_TIME = 16


def write_decoded(
    out: Path,
    autoencoder: "Autoencoder",
    latent_Chw: "Tensor",
    tiling: Tiling,
    actors: TileActors,
    cluster: ClusterConfig,
    crop_px: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Decode ``latent_Chw``, in the VAE's own scale, into ``out``; returns height and width in pixels.

    Says beforehand how much memory feature maps take. crop_px: height and width of the upper left corner that
    is wanted. UserError where that is larger than the image, and as `ldm.tiling.decode_rows`.
    """
    from ldm.image_rows import write_image
    from ldm.tiling.decode import decode_rows

    autoencoder.check_latents(latent_Chw[None])
    size = _size(autoencoder, latent_Chw, crop_px)
    _doubt_scale(autoencoder, latent_Chw)
    _announce(autoencoder, latent_Chw, tiling)
    with ExitStack() as stack:
        if actors.size:
            from pipelines.tiled_decode import SharedDecoder

            stack.enter_context(connected(cluster))
            rows = SharedDecoder(autoencoder.name, actors).decode_rows(latent_Chw, tiling)
        else:
            rows = decode_rows(autoencoder, latent_Chw, tiling)
        write_image(out, _pixels(rows), size)
    return size


def require_room(autoencoder: "Autoencoder", shape_Chw: tuple[int, int, int], tiling: Tiling) -> None:
    """UserError where this machine has no room to decode a latent of that shape."""
    from ldm.tiling.decode import plan
    from ldm.tiling.maps import Storage

    if tiling.mode != "whole":
        Storage(tiling.spill).require(plan(autoencoder, shape_Chw, tiling).needed_bytes)


def _size(
    autoencoder: "Autoencoder", latent_Chw: "Tensor", crop_px: tuple[int, int] | None
) -> tuple[int, int]:
    height, width = (side * autoencoder.f for side in latent_Chw.shape[1:])
    if crop_px is None:
        return height, width
    if crop_px[0] > height or crop_px[1] > width:
        raise UserError(f"{crop_px[0]}×{crop_px[1]} px of an image of {height}×{width} px")
    return crop_px


def _doubt_scale(autoencoder: "Autoencoder", latent_Chw: "Tensor") -> None:
    """A note where the latent looks like one of another scale: whitened for a U-Net, or of another VAE.

    No more than a note, since an image of one colour has such latents too.
    """
    std = _whitened_std(autoencoder, latent_Chw)
    if not MIN_STD < std < MAX_STD:
        print(
            f"note: this latent varies {std:.2g} times as much as latents of VAE {autoencoder.name} usually; "
            "it should be in the VAE's own scale, not whitened",
            file=sys.stderr,
        )


def _whitened_std(autoencoder: "Autoencoder", latent_Chw: "Tensor") -> float:
    """Channel by channel: a copy of the latent would be among the largest things that a decode holds."""
    import torch

    scale_C = torch.tensor(autoencoder.whitening.scale_C)
    variance_C, mean_C = torch.var_mean(latent_Chw, dim=(1, 2), correction=0)
    white_C = (mean_C - torch.tensor(autoencoder.whitening.shift_C)) / scale_C
    return float(((variance_C / scale_C**2).mean() + white_C.var(correction=0)) ** 0.5)


def _announce(autoencoder: "Autoencoder", latent_Chw: "Tensor", tiling: Tiling) -> None:
    from ldm.tiling.decode import plan
    from ldm.tiling.maps import gigabytes

    if tiling.mode == "whole":
        return
    needed_bytes = plan(autoencoder, latent_Chw.shape, tiling).needed_bytes
    where = "memory" if tiling.spill is None else f"space in {tiling.spill}"
    print(f"feature maps need {gigabytes(needed_bytes)} of {where}", flush=True)


def _pixels(rows: "Iterator[Rows]") -> "Iterator[NDArray[np.uint8]]":
    import torch

    from ldm.image_tensors import from_model

    for band in rows:
        # A few rows at a time: rounding makes several copies of what it is given.
        for part_rWC in torch.split(band.values_rWC, ROWS_AT_A_TIME):
            yield from_model(part_rWC.permute(2, 0, 1)[None])[0]
