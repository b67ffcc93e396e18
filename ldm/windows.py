"""Overlapping windows on a latent: where they lie, and the mean of what was predicted in each of them.

A U-Net that sees one window at a time denoises a latent of any size, when the predictions are averaged before
every scheduler step (MultiDiffusion: Bar-Tal et al. 2023, eq. 5).

Shape suffixes: C channels, H and W rows and columns of the canvas, h and w those of a window.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Corner", "WindowGrid", "WindowMean"]

Corner = tuple[int, int]  # first row and first column of a window


@dataclass(frozen=True)
class WindowGrid:
    """Windows of one size that cover a canvas, whatever the place where their grid begins.

    canvas_HW; window_hw, no larger; stride_hw, 1 to the window's size; multiple: what every corner is a
    multiple of, as canvas, window and stride are.
    """

    canvas_HW: tuple[int, int]
    window_hw: tuple[int, int]
    stride_hw: tuple[int, int]
    multiple: int

    @classmethod
    def of(
        cls, canvas_HW: tuple[int, int], largest_hw: tuple[int, int], overlap: float, multiple: int
    ) -> "WindowGrid":
        """Windows as large as allowed, that share at least ``overlap`` of a side with the next one.

        ValueError where the canvas or the largest window is no multiple of ``multiple``, or ``overlap``
        is not in [0, 1).
        """
        if any(side < 1 or side % multiple for side in (*canvas_HW, *largest_hw)) or not 0 <= overlap < 1:
            raise ValueError(f"windows {largest_hw} on {canvas_HW} in steps of {multiple}, overlap {overlap}")
        height, width = (min(sides) for sides in zip(canvas_HW, largest_hw, strict=True))
        stride = tuple(max(1, int(side * (1 - overlap)) // multiple) * multiple for side in (height, width))
        return cls(canvas_HW, (height, width), (stride[0], stride[1]), multiple)

    def corners(self, rng: np.random.Generator) -> list[Corner]:
        """Row by row; the grid begins at a random place. Windows at the canvas's edges are moved inside."""
        rows, columns = (
            _starts(*sides, self.multiple * int(rng.integers(sides[2] // self.multiple)))
            for sides in zip(self.canvas_HW, self.window_hw, self.stride_hw, strict=True)
        )
        return [(row, column) for row in rows for column in columns]

    def weights_hw(self) -> Tensor:
        """Whole numbers ≥ 1, float64, that fall to 1 at the window's edges, over the width of the overlap."""
        rows, columns = (
            torch.arange(1, side + 1).minimum(torch.arange(side, 0, -1)).clamp(max=side - stride + 1)
            for side, stride in zip(self.window_hw, self.stride_hw, strict=True)
        )
        return torch.outer(rows, columns).double()


def _starts(length: int, window: int, stride: int, offset: int) -> list[int]:
    """First lines of windows that cover ``length`` lines, those of the grid at ``offset`` < stride."""
    last = length - window
    return sorted({min(max(0, start), last) for start in range(offset - stride, last + stride, stride)})


class WindowMean:
    """The weighted mean of windows' predictions at every place of a canvas.

    Weights are whole numbers and sums are in double precision: float32 predictions that agree have just their
    value as mean, however many windows there are. Windows must come in one order for one result.
    """

    def __init__(self, num_channels: int, grid: WindowGrid) -> None:
        self.weights_hw = grid.weights_hw()
        self.sum_CHW = torch.zeros(num_channels, *grid.canvas_HW, dtype=torch.float64)
        self.weight_HW = torch.zeros(grid.canvas_HW, dtype=torch.float64)

    def add(self, corner: Corner, prediction_Chw: Tensor) -> None:
        """One window's prediction, float32, whose first row and column are ``corner``."""
        (top, left), (height, width) = corner, self.weights_hw.shape
        rows, columns = slice(top, top + height), slice(left, left + width)
        self.sum_CHW[:, rows, columns] += prediction_Chw.double() * self.weights_hw
        self.weight_HW[rows, columns] += self.weights_hw

    def result(self) -> Tensor:
        """float32 (C, H, W). ValueError where a place is in no window."""
        if not self.weight_HW.all():
            raise ValueError("the windows do not cover the canvas")
        return (self.sum_CHW / self.weight_HW).float()
