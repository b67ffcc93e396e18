"""Latents of any size to images, band by band."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.autoencoder import Autoencoder
from ldm.tiling import exact, fast
from ldm.tiling.chain import Step, decoder_chain, sizes
from ldm.tiling.config import Tiling
from ldm.tiling.exact import BandRunner, Rows
from ldm.tiling.grid import Grid, grid_of
from ldm.tiling.maps import BandedMap, Storage
from ldm.tiling.spans import Span
from ldm.tiling.statistics import ChannelMoments

__all__ = ["Plan", "decode", "decode_rows", "plan"]


def decode(autoencoder: Autoencoder, latent_Chw: Tensor, tiling: Tiling) -> Tensor:
    """As `Autoencoder.decode` for one image: (3, h·f, w·f), float32 in [-1, 1], on the CPU."""
    bands = [rows.values_rWC for rows in decode_rows(autoencoder, latent_Chw, tiling)]
    return torch.cat(bands).permute(2, 0, 1)


def decode_rows(autoencoder: Autoencoder, latent_Chw: Tensor, tiling: Tiling) -> Iterator[Rows]:
    """The image's rows (rows, w·f, 3) from the top, float32 in [-1, 1], on the CPU.

    latent_Chw: in the VAE's own scale. Besides `Plan.needed_bytes` no more than a band of the image is held.
    UserError, before anything is computed, for a latent of another VAE, a VAE that cannot be tiled, and where
    memory or spill folder have no room.
    """
    autoencoder.check_latents(latent_Chw[None])
    if tiling.mode == "whole":
        return _whole(autoencoder, latent_Chw)
    planned = plan(autoencoder, latent_Chw.shape, tiling)
    storage = Storage(tiling.spill)
    storage.require(planned.needed_bytes)
    return _tiled(planned, latent_Chw, storage)


@dataclass(frozen=True)
class Plan:
    """``steps`` are computed exactly, one after the other; then ``wide``, if any, all at once for a tile."""

    steps: Sequence[Step]
    wide: Sequence[Step]
    grid: Grid
    pooling: int

    @property
    def needed_bytes(self) -> int:
        """Bytes of host memory, or of the spill folder, that all maps take."""
        needed = exact.needed_bytes(self.steps, self.grid, self.grid.latent_size)
        small = exact.needed_bytes(self.all_steps, self.small_grid, self.small_grid.latent_size)
        return max(needed + self._latent_and_bands_bytes, small)

    @property
    def _latent_and_bands_bytes(self) -> int:
        """Of the latent, and of tiles' rows of the image: those that are computed, and those before them."""
        (height, width), itemsize = self.grid.latent_size, exact.placement(self.all_steps)[1].itemsize
        latent_bytes = self.all_steps[0].in_channels * height * width * itemsize
        if not self.wide:
            return latent_bytes
        out_height, out_width = sizes(self.all_steps, self.grid.latent_size)[-1]
        band_height = self.grid.band(0, out_height).size
        return latent_bytes + 2 * band_height * out_width * self.wide[-1].out_channels * itemsize

    @property
    def all_steps(self) -> Sequence[Step]:
        return [*self.steps, *self.wide]

    @property
    def needs_small(self) -> bool:
        """Whether a wide step has a norm, whose statistics come from the pooled latent."""
        return any(step.norm is not None for step in self.wide)

    @property
    def small_grid(self) -> Grid:
        """Of the pooled latent that the statistics of wide steps are taken from."""
        height, width = (side // self.pooling for side in self.grid.latent_size)
        return grid_of(self.all_steps, (height, width), (height, width), self.grid.tile)

    def runner(self, latent_Chw: Tensor, bands: range, storage: Storage) -> BandRunner:
        """Computes those bands of the maps of ``steps``."""
        return BandRunner(self.steps, self.grid, BandedMap.whole(latent_Chw, storage), bands, storage)

    def pooled(self, latent_Chw: Tensor) -> Tensor:
        """The small latent, as `small_grid` has it."""
        return F.avg_pool2d(latent_Chw[None].float(), self.pooling)[0]

    def small_runner(self, pooled_Chw: Tensor, bands: range, storage: Storage) -> BandRunner:
        """Computes those bands of every map of the `pooled` latent."""
        latent = BandedMap.whole(pooled_Chw, storage)
        return BandRunner(self.all_steps, self.small_grid, latent, bands, storage)

    def finish(
        self,
        runner: BandRunner,
        moments: ChannelMoments | None,
        small: fast.MomentsByStep,
        neighbours: Sequence[Rows] = (),
    ) -> Iterator[Rows]:
        """The runner's bands of the image, after all but the last of `stages`.

        moments: of the map that it begins with; small: `fast.small_moments`, where `needs_small`;
        neighbours: as for `BandRunner.sweep`.
        """
        if not self.wide:
            return map(_finished, runner.last_sweep(moments, neighbours))
        source = runner.current
        assert isinstance(source, BandedMap)
        for rows in neighbours:
            source.put(*rows)
        small = {index - len(self.steps): found for index, found in small.items()}
        swept = fast.sweep(self.wide, self.grid, source, small, runner.bands, runner.storage)
        return map(_finished, swept)

    @property
    def stages(self) -> tuple[Sequence[Step], Sequence[Step]]:
        """Steps that a crew advances by, and those that `finish` computes."""
        return (self.steps, self.wide) if self.wide else (self.steps[:-1], self.steps[-1:])


def plan(autoencoder: Autoencoder, shape_Chw: Sequence[int], tiling: Tiling) -> Plan:
    """How to decode a latent of that shape, exactly or fast. UserError for a VAE that cannot be tiled."""
    steps, size = decoder_chain(autoencoder.vae), (int(shape_Chw[-2]), int(shape_Chw[-1]))
    grid = grid_of(steps, size, size, tiling.tile)
    outputs = sizes(steps, size)[1:]
    num_narrow = next((index for index, found in enumerate(outputs) if found != size), len(steps))
    num_exact = num_narrow if tiling.mode == "fast" else len(steps)
    pooling = fast.pooling_factor(size, tiling.coarse)
    return Plan(steps[:num_exact], steps[num_exact:], grid, pooling)


def _finished(rows: Rows) -> Rows:
    return Rows(rows.span, rows.values_rWC.float().clamp_(-1, 1))


@torch.inference_mode()
def _whole(autoencoder: Autoencoder, latent_Chw: Tensor) -> Iterator[Rows]:
    image_3HW = autoencoder.decode(latent_Chw[None])[0].cpu()
    yield Rows(Span(0, image_3HW.shape[1]), image_3HW.permute(1, 2, 0))


def _small_moments(planned: Plan, latent_Chw: Tensor, storage: Storage) -> fast.MomentsByStep:
    pooled_Chw, bands = planned.pooled(latent_Chw), range(planned.small_grid.num_bands)
    runner = planned.small_runner(pooled_Chw, bands, storage)
    found = fast.small_moments(planned.all_steps, runner)
    exact.give_back(planned.grid)
    return found


@torch.inference_mode()
def _tiled(planned: Plan, latent_Chw: Tensor, storage: Storage) -> Iterator[Rows]:
    small = _small_moments(planned, latent_Chw, storage) if planned.needs_small else {}
    runner = planned.runner(latent_Chw, range(planned.grid.num_bands), storage)
    moments = exact.advance(planned.stages[0], runner)
    yield from planned.finish(runner, moments, small)
