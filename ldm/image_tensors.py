"""Between images as data, uint8 (B, H, W, 3), and as model input, float (B, 3, H, W) in [-1, 1]."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["from_model", "image_grid", "to_model"]


def to_model(images_BHW3: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W) in [-1, 1], channels last in memory.

    A tensor stays on its device.
    """
    if isinstance(images_BHW3, np.ndarray):
        images_BHW3 = torch.from_numpy(np.array(images_BHW3))
    return images_BHW3.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def from_model(images_B3HW: Tensor) -> NDArray[np.uint8]:
    """float (B, 3, H, W) in [-1, 1] → uint8 (B, H, W, 3), rounded to nearest."""
    images = images_B3HW.float().clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())


def image_grid(images_BHW3: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Images side by side, row by row, at most ``columns`` in one; black where the last row is not full."""
    from torchvision.utils import make_grid  # type: ignore[import-untyped]

    images_B3HW = torch.from_numpy(images_BHW3).permute(0, 3, 1, 2)
    return np.ascontiguousarray(make_grid(images_B3HW, columns, padding=0).permute(1, 2, 0).numpy())
