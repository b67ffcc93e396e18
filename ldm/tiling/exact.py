"""Exact tiling: one step of the chain after the other over the whole map, tile by tile, out of core.

Every step has the statistics of the whole map, the neighbours of its tile and all keys. So the result is
that of the whole network, up to rounding. The device holds one tile; the maps lie in host memory or in a
spill folder, and a band is given back as soon as no tile needs it.

A `BandRunner` has some consecutive bands. With all of them it computes an image alone; otherwise it is told
its neighbours' rows and all keys and values, and gives its own. Either way `advance` tells what is next,
and merges the statistics.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ldm.tiling.chain import Affine, AttentionStep, ConvStep, Step, sizes
from ldm.tiling.grid import Grid
from ldm.tiling.maps import BandedMap, Map, Storage, give_back_freed
from ldm.tiling.spans import Rect, Span
from ldm.tiling.statistics import ChannelMoments, affine_of

__all__ = [
    "BandRunner",
    "Crew",
    "Rows",
    "advance",
    "give_back",
    "needed_bytes",
    "needed_rect",
    "needed_rows",
    "placement",
    "run",
]


# To give memory back after every band and to get it again takes 0.2 s: a tenth of what 1024² px take (f8).
LARGE_LATENTS = 512**2


class Rows(NamedTuple):
    """Rows (rows, width, C) of a map."""

    span: Span
    values_rWC: Tensor


class Crew(Protocol):
    """Who computes the steps of a chain, for all bands: one `BandRunner`, or several.

    moments: of the whole input, where the step has a norm. Results: the moments of each band, from the top,
    where the next step has a norm.
    """

    def sweep(self, index: int, moments: ChannelMoments | None) -> list[ChannelMoments]:
        """Compute step ``index``, a convolution."""
        ...

    def attend(self, index: int, moments: ChannelMoments) -> list[ChannelMoments]:
        """Compute step ``index``, an attention."""
        ...


def placement(chain: Sequence[Step]) -> tuple[torch.device, torch.dtype]:
    """Where a chain's weights lie, and of what type they are."""
    weight = next(step.conv.weight for step in chain if isinstance(step, ConvStep))
    return weight.device, weight.dtype


def give_back(grid: Grid) -> None:
    """Give freed memory back where the image is so large that the time for that does not count."""
    if prod(grid.latent_size) >= LARGE_LATENTS:
        give_back_freed()


def needed_rect(step: Step, want: Rect, in_size: tuple[int, int]) -> Rect:
    """What of a step's input the rectangle ``want`` of its output is computed from."""
    return Rect(step.needs(want.rows, in_size[0]), step.needs(want.columns, in_size[1]))


class BandRunner:
    """Computes the bands ``bands`` of every map of a chain, one step after the other.

    chain, grid: as everyone else's; weights and tiles are on the chain's device, of its dtype.
    """

    def __init__(
        self, chain: Sequence[Step], grid: Grid, source: Map, bands: range, storage: Storage
    ) -> None:
        self.chain, self.grid, self.bands, self.storage = chain, grid, bands, storage
        self.sizes = sizes(chain, source.size)
        self.current: Map = source
        self.kept: BandedMap | None = None
        self.device, self.dtype = placement(chain)

    def copy_rows(self, rows: Span) -> Tensor:
        """(rows, width, C) of the current map, for a neighbour."""
        assert isinstance(self.current, BandedMap)
        return self.current.copy_rows(rows)

    def sweep(
        self, index: int, moments: ChannelMoments | None, neighbours: Sequence[Rows] = ()
    ) -> list[ChannelMoments]:
        """As `Crew.sweep`, for these bands. neighbours: rows of the input that are read beyond them."""
        target = self._target(index)
        # In one piece, and before the tiles: what is small and stays would split the room that they free.
        merged_B2C, counts = np.empty((len(self.bands), 2, target.channels)), []
        for band, tiles in enumerate(self._bands_of(index, moments, neighbours, target)):
            if tiles:
                found = ChannelMoments.merge(tiles)
                merged_B2C[band] = found.mean_C, found.m2_C
                counts.append(found.count)
        self.current = target
        give_back(self.grid)
        return [ChannelMoments(count, *both) for count, both in zip(counts, merged_B2C, strict=False)]

    def last_sweep(self, moments: ChannelMoments | None, neighbours: Sequence[Rows] = ()) -> Iterator[Rows]:
        """Compute the last step; yields each band, whole, as soon as it is there."""
        index = len(self.chain) - 1
        target = self._target(index)
        bands = iter(self.bands)
        for _ in self._bands_of(index, moments, neighbours, target):
            rows = self.grid.band(next(bands), target.size[0])
            give_back(self.grid)
            yield Rows(rows, target.take(rows))

    def keys_and_values(self, index: int, moments: ChannelMoments) -> tuple[Tensor, Tensor]:
        """Of an attention, for all positions of these bands: (N, C) each, in the order of the positions."""
        step = self.chain[index]
        assert isinstance(step, AttentionStep)
        affine = affine_of(step.norm, moments)
        keys, values = (BandedMap(step.in_channels, self.sizes[index]) for _ in range(2))
        for band in self.bands:
            rows = self.grid.band(band, self.sizes[index][0])
            for found in (keys, values):
                found.new_band(rows, self.storage, self.dtype)
            for tile in self._tiles(index, band):
                both = step.keys_and_values(self._read(tile), affine)
                for found, part in zip((keys, values), both, strict=True):
                    found.write(tile, part)
        own = self.grid.rows(self.bands, self.sizes[index][0])
        return keys.copy_rows(own).flatten(0, 1), values.copy_rows(own).flatten(0, 1)

    def attend(
        self, index: int, moments: ChannelMoments, keys_and_values: tuple[Tensor, Tensor] | None = None
    ) -> list[ChannelMoments]:
        """As `Crew.attend`, for these bands. keys_and_values: of all bands, where these are not all."""
        step = self.chain[index]
        assert isinstance(step, AttentionStep) and isinstance(self.current, BandedMap)
        affine = affine_of(step.norm, moments)
        both_NC = keys_and_values or self.keys_and_values(index, moments)
        keys_1NC, values_1NC = (part_NC[None].to(self.device) for part_NC in both_NC)
        merged = []
        for band in self.bands:
            found = []
            for tile in self._tiles(index, band):
                y = step.run(self._read(tile), affine, keys_1NC, values_1NC)
                self.current.write(tile, y)
                found.append(ChannelMoments.of(y))
            merged.append(ChannelMoments.merge(found))
        return merged

    def _bands_of(
        self, index: int, moments: ChannelMoments | None, neighbours: Sequence[Rows], target: BandedMap
    ) -> Iterator[list[ChannelMoments]]:
        """Compute a convolution's bands into ``target``; yields the moments of each one's tiles."""
        step, source = self.chain[index], self.current
        assert isinstance(step, ConvStep)
        affine = None if step.norm is None or moments is None else affine_of(step.norm, moments)
        self._keep(step, index)
        for rows in neighbours:
            assert isinstance(source, BandedMap)
            source.put(*rows)
        with_moments = index + 1 < len(self.chain) and self.chain[index + 1].norm is not None
        for band in self.bands:
            found = []
            self._new_bands(index, band, target)
            for tile in self._tiles(index, band):
                y = self._compute(step, index, tile, affine)
                target.write(tile, y)
                if with_moments:
                    found.append(ChannelMoments.of(y))
            if source is not self.kept:
                source.drop_before(self._first_needed(index, band + 1))
            yield found
        if isinstance(source, BandedMap):
            for rows in neighbours:
                source.forget(rows.span)
        if step.adds:
            self.kept = None

    def _compute(self, step: ConvStep, index: int, tile: Rect, affine: Affine | None) -> Tensor:
        size = self.sizes[index]
        need = needed_rect(step, tile, size)
        x = self._read(need)
        y = step.run(x, need, tile, size, affine)
        if isinstance(step.keeps, nn.Conv2d):
            assert self.kept is not None
            core = x[..., tile.rows.within(need.rows), tile.columns.within(need.columns)]
            self.kept.write(tile, step.keeps(core))
        kept = None
        if step.adds:
            assert self.kept is not None
            kept = self.kept.read(tile, self.device, self.dtype)
        return step.finish(y, kept)

    def _keep(self, step: ConvStep, index: int) -> None:
        """Where a residual connection begins: its other end adds to what is kept."""
        if step.keeps is None:
            return
        if not isinstance(step.keeps, nn.Identity):
            self.kept = BandedMap(step.kept_channels, self.sizes[index])
            return
        assert isinstance(self.current, BandedMap)
        self.kept = self.current

    def _target(self, index: int) -> BandedMap:
        """What step ``index`` writes: where it adds what was kept, in the place of that."""
        step = self.chain[index]
        if isinstance(step, ConvStep) and step.adds:
            assert self.kept is not None and self.kept.channels == step.out_channels
            return self.kept
        return BandedMap(step.out_channels, self.sizes[index + 1])

    def _new_bands(self, index: int, band: int, target: BandedMap) -> None:
        step, rows = self.chain[index], self.grid.band(band, target.size[0])
        if target is not self.kept:
            target.new_band(rows, self.storage, self.dtype)
        if isinstance(step, ConvStep) and isinstance(step.keeps, nn.Conv2d):
            assert self.kept is not None
            self.kept.new_band(rows, self.storage, self.dtype)

    def _tiles(self, index: int, band: int) -> Iterator[Rect]:
        yield from self.grid.tiles(band, self.sizes[index + 1], self.chain[index].values_per_position)

    def _first_needed(self, index: int, band: int) -> int:
        """The first row that band ``band`` and those after it read."""
        if band not in self.bands:
            return self.sizes[index][0]
        rows = self.grid.band(band, self.sizes[index + 1][0])
        return self.chain[index].needs(rows, self.sizes[index][0]).start

    def _read(self, rect: Rect) -> Tensor:
        return self.current.read(rect, self.device, self.dtype)


def advance(
    steps: Sequence[Step],
    crew: Crew,
    moments: Sequence[ChannelMoments] = (),
    seen: dict[int, ChannelMoments] | None = None,
) -> ChannelMoments | None:
    """Let a crew compute its chain's first steps, ``steps``; returns the moments of what comes out.

    moments: of the source's bands, where the first step has a norm. Those of the result are None where the
    chain has no use for them. seen: is given the moments of the input of every step that has a norm.
    """
    for index, step in enumerate(steps):
        merged = ChannelMoments.merge(moments) if step.norm is not None else None
        if seen is not None and merged is not None:
            seen[index] = merged
        if isinstance(step, AttentionStep):
            assert merged is not None
            moments = crew.attend(index, merged)
        else:
            moments = crew.sweep(index, merged)
    return ChannelMoments.merge(moments) if moments else None


def run(
    chain: Sequence[Step], grid: Grid, source: Map, storage: Storage, moments: Sequence[ChannelMoments] = ()
) -> Iterator[Rows]:
    """The whole chain in this process; yields the result's bands from the top. moments: as for `advance`."""
    runner = BandRunner(chain, grid, source, range(grid.num_bands), storage)
    yield from runner.last_sweep(advance(chain[:-1], runner, moments))


def needed_rows(chain: Sequence[Step], grid: Grid, bands: range, found: Sequence[tuple[int, int]]) -> Span:
    """Rows of the input of a chain, whose `sizes` are ``found``, that bands of its output depend on."""
    rows = grid.rows(bands, found[-1][0])
    for step, (height, _) in zip(reversed(chain), reversed(found[:-1]), strict=True):
        rows = step.needs(rows, height)
    return rows


def needed_bytes(chain: Sequence[Step], grid: Grid, in_size: tuple[int, int]) -> int:
    """Of all maps together at the worst moment, in host memory or in the spill folder."""
    found = sizes(chain, in_size)
    _, dtype = placement(chain)
    kept = worst = 0
    for index, (step, before, after) in enumerate(zip(chain, found, found[1:], strict=False)):
        read, written = step.in_channels * before[0] * before[1], step.out_channels * after[0] * after[1]
        new = written if index + 1 < len(chain) else 0
        if isinstance(step, AttentionStep):
            # Keys and values, and for a moment all of them in one piece.
            worst = max(worst, read + 4 * written)
            continue
        if isinstance(step.keeps, nn.Conv2d):
            kept = step.kept_channels * after[0] * after[1]
            new += kept
        elif step.keeps is not None:
            # The input stays whole beside the output.
            kept, read = read, 0
            new += kept
        elif step.adds:
            new = kept
        # A band that is read is given back when the one after it has been computed.
        shrinking = 0 if index == 0 else read
        worst = max(worst, max(shrinking, new) + 2 * (shrinking + new) // grid.num_bands)
        kept = 0 if step.adds else kept
    return worst * dtype.itemsize
