"""How visible the borders of tiles or windows are, in an image or a latent."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["seam_ratio"]

# Lines on either side of a border that say what a step between lines is there without one.
NEIGHBOURS = 4


def seam_ratio(array_HWC: ArrayLike, rows: Sequence[int] = (), columns: Sequence[int] = ()) -> float:
    """Mean |step| across the borders ÷ mean |step| between the lines beside them; near 1 without a seam.

    array_HWC: (H, W, C) of any real dtype. rows, columns: the first line behind each border, so 8 is
    the border between lines 7 and 8. The lines beside a border are the 4 on either side, less those that
    are at a border themselves; so a picture that is busier elsewhere changes nothing. Rows and columns
    count by the number of their steps. Infinite where only the borders have steps; 1 where nothing has.

    ValueError without a border, for one outside of the array, and where no line beside one is left.
    """
    array = np.asarray(array_HWC)
    if array.ndim != 3 or not (len(rows) or len(columns)):
        raise ValueError(
            f"need an (H, W, C) array and a border, got {array.shape}, {len(rows)} and {len(columns)}"
        )
    given = [(axis, borders) for axis, borders in enumerate((rows, columns)) if len(borders)]
    parts = [_steps(np.moveaxis(array, axis, 0), borders) for axis, borders in given]
    across, beside = (np.concatenate(side).mean(dtype=np.float64) for side in zip(*parts, strict=True))
    if beside == 0:
        return 1.0 if across == 0 else float("inf")
    return float(across / beside)


def _steps(lines: NDArray[np.generic], borders: Sequence[int]) -> tuple[NDArray[np.float64], ...]:
    """|steps| (flat) across the borders between ``lines`` (first axis), and between the lines beside them."""
    if not all(0 < border < len(lines) for border in borders):
        raise ValueError(f"borders {sorted(borders)} of {len(lines)} lines: allowed 1 to {len(lines) - 1}")
    near = {border + i for border in borders for i in range(-NEIGHBOURS, NEIGHBOURS + 1)}
    beside = sorted(line for line in near - set(borders) if 0 < line < len(lines))
    if not beside:
        raise ValueError(f"no line beside the borders {sorted(borders)} that is not at a border")
    return tuple(_step_sizes(lines, chosen) for chosen in (sorted(set(borders)), beside))


def _step_sizes(lines: NDArray[np.generic], chosen: Sequence[int]) -> NDArray[np.float64]:
    after, before = (lines[[line - back for line in chosen]].astype(np.float64) for back in (0, 1))
    sizes: NDArray[np.float64] = np.abs(after - before).ravel()
    return sizes
