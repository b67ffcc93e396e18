"""Fast tiling: where maps are larger than the latent, every tile goes through all steps at once.

Its neighbourhood is computed again for each tile, as far as the convolutions see, and GroupNorm's
statistics are estimated beforehand on a small copy of the image. All tiles apply the same function, so
there is no seam, and no map larger than the latent is ever held. Where maps have the latent's size, which
is where most of a VAE's channels are, steps are taken exactly.
"""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch import Tensor

from ldm.tiling.chain import Affine, ConvStep, Step, sizes
from ldm.tiling.exact import Crew, Rows, advance, give_back, needed_rect, placement
from ldm.tiling.grid import Grid
from ldm.tiling.maps import Map, Storage
from ldm.tiling.spans import Rect
from ldm.tiling.statistics import ChannelMoments, affine_of

__all__ = ["MomentsByStep", "inputs_of", "pooling_factor", "run_tile", "small_moments", "sweep"]

MomentsByStep: TypeAlias = dict[int, ChannelMoments]

# Not only after a band, whose number of tiles grows with the image.
TILES_TO_GIVE_BACK = 16


def sweep(
    steps: Sequence[Step],
    grid: Grid,
    source: Map,
    small: MomentsByStep,
    bands: range,
    storage: Storage,
) -> Iterator[Rows]:
    """Those bands of the output of ``steps``, from the top, in tiles as high as they are wide.

    small: the moments of the input of every step that has a norm.
    """
    found = sizes(steps, source.size)
    affines = [None if step.norm is None else affine_of(step.norm, small[i]) for i, step in enumerate(steps)]
    device, dtype = placement(steps)
    height, width = found[-1]
    for band in bands:
        rows = grid.band(band, height)
        values_rWC = storage.empty((rows.size, width, steps[-1].out_channels), dtype)
        tiles = list(grid.columns(width))
        for index, columns in enumerate(tiles, start=1):
            rects = inputs_of(steps, found, Rect(rows, columns))
            x = source.read(rects[0], device, dtype)
            y = run_tile(steps, found, affines, x, rects)
            values_rWC[:, columns.start : columns.stop] = y[0].permute(1, 2, 0)
            if index % TILES_TO_GIVE_BACK == 0 or index == len(tiles):
                give_back(grid)
        yield Rows(rows, values_rWC)


def small_moments(steps: Sequence[Step], crew: Crew) -> MomentsByStep:
    """Moments of the input of every step with a norm, for a source that is small, which the crew has."""
    seen: MomentsByStep = {}
    last = advance(steps[:-1], crew, seen=seen)
    return seen if last is None else seen | {len(steps) - 1: last}


def pooling_factor(latent_size: Sequence[int], coarse: int) -> int:
    """By how much a latent is pooled so that no side has more than ``coarse``: at least 2, to save time."""
    return min(*latent_size, max(2, -(-max(latent_size) // coarse)))


def inputs_of(chain: Sequence[Step], sizes: Sequence[tuple[int, int]], want: Rect) -> list[Rect]:
    """What of every step's input the rectangle ``want`` of the last output depends on, and ``want``."""
    rects = [want]
    for step, size in zip(reversed(chain), reversed(sizes[:-1]), strict=True):
        rects.append(needed_rect(step, rects[-1], size))
    return rects[::-1]


def run_tile(
    chain: Sequence[Step],
    sizes: Sequence[tuple[int, int]],
    affines: Sequence[Affine | None],
    x: Tensor,
    rects: Sequence[Rect],
) -> Tensor:
    """The chain's output (1, C, rows, columns) in ``rects[-1]``, from ``x``, its input in ``rects[0]``."""
    kept: Tensor | None = None
    kept_rect = rects[0]
    for step, size, affine, have, want in zip(chain, sizes, affines, rects, rects[1:], strict=False):
        assert isinstance(step, ConvStep)
        if step.keeps is not None:
            kept, kept_rect = x, have
            shortcut = step.keeps
        x = step.run(x, have, want, size, affine)
        added = None
        if step.adds:
            assert kept is not None
            rows, columns = (span.within(outer) for span, outer in zip(want, kept_rect, strict=True))
            added = shortcut(kept[..., rows, columns])
        x = step.finish(x, added)
    return x
