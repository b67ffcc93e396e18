"""How a map is cut into tiles: the same for one process and for many, so that rounding is the same too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ldm.tiling.chain import Step, sizes
from ldm.tiling.spans import Rect, Span

__all__ = ["Grid", "grid_of"]


@dataclass(frozen=True)
class Grid:
    """Bands of ``tile`` rows of latents, cut into tiles of at most ``tile_values`` values.

    latent_size: (h, w). A map of n·h rows has bands of n·tile rows. tile_values: of the larger of a step's
    input and output, in their tile: what bounds the device's memory. At low resolution a tile is wider for
    it, with less of a border to compute twice.
    """

    latent_size: tuple[int, int]
    tile: int
    tile_values: int

    @property
    def num_bands(self) -> int:
        return -(-self.latent_size[0] // self.tile)

    def band(self, index: int, height: int) -> Span:
        """Rows of band ``index`` of a map with ``height`` rows, a whole multiple of the latent's."""
        scale = height // self.latent_size[0]
        assert height == scale * self.latent_size[0]
        return Span(index * self.tile, (index + 1) * self.tile).clip(self.latent_size[0]).scaled(scale)

    def rows(self, bands: range, height: int) -> Span:
        """Rows of consecutive bands."""
        return Span(self.band(bands[0], height).start, self.band(bands[-1], height).stop)

    def columns(self, width: int) -> Iterator[Span]:
        """Columns of square tiles, of a map with ``width``."""
        scale = width // self.latent_size[1]
        for start in range(0, self.latent_size[1], self.tile):
            yield Span(start, start + self.tile).clip(self.latent_size[1]).scaled(scale)

    def tiles(self, index: int, size: tuple[int, int], values_per_position: int) -> Iterator[Rect]:
        """Tiles of a band of a map of ``size``, from left to right."""
        rows = self.band(index, size[0])
        width = max(1, self.tile_values // (values_per_position * rows.size))
        count = -(-size[1] // width)
        edges = [size[1] * i // count for i in range(count + 1)]
        for start, stop in pairwise(edges):
            yield Rect(rows, Span(start, stop))


def grid_of(steps: Sequence[Step], in_size: tuple[int, int], latent_size: tuple[int, int], tile: int) -> Grid:
    """The grid in which no tile has more values than half of what ``tile``² latents have at the end.

    Half, so that exact steps, which hold several tiles at a time, need no more memory than fast ones.
    """
    found = sizes(steps, in_size)
    largest = max(found)
    ends = [
        (size, channels)
        for step, before, after in zip(steps, found, found[1:], strict=False)
        for size, channels in ((before, step.in_channels), (after, step.out_channels))
    ]
    channels = max(channels for size, channels in ends if size == largest)
    scale = largest[0] // latent_size[0]
    return Grid(latent_size, tile, (tile * scale) ** 2 * channels // 2)
