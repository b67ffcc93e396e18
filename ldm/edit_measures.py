"""How much an edit kept of its original: pixels, perceptual distance, features.

Shape suffixes: B edits, H and W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ldm.features import Extractor
from ldm.metrics import psnr
from ldm.perceptual import Perceptual

__all__ = ["Kept", "kept"]


@dataclass(frozen=True)
class Kept:
    """What one edit kept of the original.

    psnr_db: of the whole image; psnr_outside_db: of the pixels outside the mask, None without one;
    distance: perceptual; cosine: of features, 1 for the same; both None where they were not asked for.
    """

    psnr_db: float
    psnr_outside_db: float | None
    distance: float | None
    cosine: float | None


@torch.no_grad()
def kept(
    edits_B3HW: Tensor,
    original_3HW: Tensor,
    perceptual: Perceptual | None = None,
    extractor: Extractor | None = None,
    mask_HW: Tensor | None = None,
) -> list[Kept]:
    """Figures of each edit; images float in [-1, 1], mask bool, True where it was repainted.

    UserError where the images are too small for the perceptual distance.
    """
    original_B3HW = original_3HW.expand_as(edits_B3HW)
    a, b = (x.clamp(-1, 1).add(1).div(2) for x in (original_B3HW, edits_B3HW))
    psnr_B = psnr(a, b)
    outside_B = None if mask_HW is None else psnr(a[..., ~mask_HW], b[..., ~mask_HW])
    distance_B = None if perceptual is None else perceptual(original_B3HW, edits_B3HW)
    cosine_B = None if extractor is None else _cosines(extractor, original_3HW, edits_B3HW)
    optional = (outside_B, distance_B, cosine_B)
    return [
        Kept(float(psnr_B[i]), *(None if x_B is None else float(x_B[i]) for x_B in optional))
        for i in range(len(edits_B3HW))
    ]


def _cosines(extractor: Extractor, original_3HW: Tensor, edits_B3HW: Tensor) -> Tensor:
    return cosine_similarity(extractor(edits_B3HW), extractor(original_3HW[None]))
