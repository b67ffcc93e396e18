"""One large image over several Ray actors: each has some bands of every map, and gives its edge rows away.

The bits are those of one process with as many torch threads: tiles do not depend on the number of actors, and
statistics are merged in the order of the tiles. What travels are edge rows, statistics and, where the VAE has
attention, keys and values.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm import autoencoder
from ldm.errors import UserError
from ldm.tiling import exact, fast
from ldm.tiling.chain import sizes
from ldm.tiling.config import Tiling
from ldm.tiling.decode import Plan, plan
from ldm.tiling.exact import Rows
from ldm.tiling.fast import MomentsByStep
from ldm.tiling.maps import Storage
from ldm.tiling.spans import Span
from ldm.tiling.statistics import ChannelMoments
from pipelines.device import pick_device
from pipelines.tile_actors import TileActors
from pipelines.vae_source import on_every_node

__all__ = ["SharedDecoder"]


class SharedDecoder:
    """Actors that decode one image after the other, each image together. Needs a connected Ray.

    vae: as for `ldm.autoencoder.load`. The actors live as long as this object.
    """

    def __init__(self, vae: str, config: TileActors) -> None:
        self.autoencoder = autoencoder.load(vae).to("cpu")
        options = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus}
        start = BandActor.options(**options).remote  # type: ignore[attr-defined]
        self.actors = [start(on_every_node(vae), config.threads) for _ in range(config.size)]

    def decode_rows(self, latent_Chw: Tensor, tiling: Tiling) -> Iterator[Rows]:
        """As `ldm.tiling.decode.decode_rows`; each actor takes its share of the memory for maps.

        UserError too for mode whole, which cannot be shared.
        """
        if tiling.mode == "whole":
            raise UserError(
                "mode whole is one call of the VAE", allowed="exact, fast", do="or ask for no actors"
            )
        self.autoencoder.check_latents(latent_Chw[None])
        planned = plan(self.autoencoder, latent_Chw.shape, tiling)
        # No more than there are bands.
        actors = self.actors[: planned.grid.num_bands]
        shape_Chw, share_bytes = tuple(latent_Chw.shape), planned.needed_bytes // len(actors)
        ray.get([actor.prepare.remote(shape_Chw, tiling, share_bytes) for actor in actors])
        small: MomentsByStep = {}
        if planned.needs_small:
            small_crew = ActorCrew(actors[: planned.small_grid.num_bands], planned, is_small=True)
            small_crew.start(planned.pooled(latent_Chw))
            small = fast.small_moments(planned.all_steps, small_crew)
        crew = ActorCrew(actors, planned, is_small=False)
        crew.start(latent_Chw)
        return crew.finish(exact.advance(planned.stages[0], crew), small)


@ray.remote
class BandActor:
    """Some bands of an image, on the device that Ray gave."""

    def __init__(self, vae: str, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.autoencoder = autoencoder.load(vae).to(pick_device())

    def prepare(self, shape_Chw: Sequence[int], tiling: Tiling, needed_bytes: int) -> None:
        self.storage = Storage(tiling.spill)
        self.storage.require(needed_bytes)
        self.plan = plan(self.autoencoder, shape_Chw, tiling)

    def start(self, latent_Chw: NDArray[Any], bands: range, *, is_small: bool) -> None:
        latent = torch.from_numpy(np.array(latent_Chw))
        start = self.plan.small_runner if is_small else self.plan.runner
        self.runner = start(latent, bands, self.storage)

    def copy_rows(self, span: Span) -> NDArray[Any]:
        rows: NDArray[Any] = self.runner.copy_rows(span).numpy()
        return rows

    @torch.inference_mode()
    def sweep(
        self, index: int, moments: ChannelMoments | None, spans: Sequence[Span], *rows: NDArray[Any]
    ) -> list[ChannelMoments]:
        return self.runner.sweep(index, moments, _neighbours(spans, rows))

    @torch.inference_mode()
    def keys_and_values(self, index: int, moments: ChannelMoments) -> NDArray[Any]:
        keys_and_values: NDArray[Any] = torch.stack(self.runner.keys_and_values(index, moments)).numpy()
        return keys_and_values

    @torch.inference_mode()
    def attend(self, index: int, moments: ChannelMoments, *parts_2NC: NDArray[Any]) -> list[ChannelMoments]:
        keys_NC, values_NC = torch.from_numpy(np.concatenate(parts_2NC, axis=1))
        return self.runner.attend(index, moments, (keys_NC, values_NC))

    def finish(
        self, moments: ChannelMoments | None, small: MomentsByStep, spans: Sequence[Span], *rows: NDArray[Any]
    ) -> Iterator[tuple[Span, NDArray[Any]]]:
        with torch.inference_mode():
            for span, values_rWC in self.plan.finish(self.runner, moments, small, _neighbours(spans, rows)):
                yield span, values_rWC.numpy()


class ActorCrew:
    """All actors, as one `ldm.tiling.exact.Crew`, for the image or for its small copy."""

    def __init__(self, actors: Sequence[Any], planned: Plan, *, is_small: bool) -> None:
        self.actors, self.plan, self.is_small = actors, planned, is_small
        self.grid = planned.small_grid if is_small else planned.grid
        edges = [self.grid.num_bands * i // len(actors) for i in range(len(actors) + 1)]
        self.bands = [range(*pair) for pair in pairwise(edges)]
        self.sizes = sizes(planned.all_steps, self.grid.latent_size)

    def start(self, latent_Chw: Tensor) -> None:
        latent = ray.put(latent_Chw.numpy())
        started = [
            actor.start.remote(latent, bands, is_small=self.is_small)
            for actor, bands in zip(self.actors, self.bands, strict=True)
        ]
        ray.get(started)

    def sweep(self, index: int, moments: ChannelMoments | None) -> list[ChannelMoments]:
        edges = self._edges(index, index + 1)
        parts = [
            actor.sweep.remote(index, moments, *edge) for actor, edge in zip(self.actors, edges, strict=True)
        ]
        return [tile for part in ray.get(parts) for tile in part]

    def attend(self, index: int, moments: ChannelMoments) -> list[ChannelMoments]:
        keys_and_values = [actor.keys_and_values.remote(index, moments) for actor in self.actors]
        parts = [actor.attend.remote(index, moments, *keys_and_values) for actor in self.actors]
        return [tile for part in ray.get(parts) for tile in part]

    def finish(self, moments: ChannelMoments | None, small: MomentsByStep) -> Iterator[Rows]:
        edges = self._edges(len(self.plan.stages[0]), len(self.plan.all_steps))
        # No bound on what is ahead: whoever has the lower bands would wait for those above to be taken.
        streams = [
            actor.finish.options(num_returns="streaming").remote(moments, small, *edge)
            for actor, edge in zip(self.actors, edges, strict=True)
        ]
        for stream in streams:
            for band in stream:
                span, values_rWC = ray.get(band)
                yield Rows(Span(*span), torch.from_numpy(np.array(values_rWC)))

    def _edges(self, start: int, stop: int) -> list[tuple[object, ...]]:
        """For each actor: spans of the others that it needs to compute ``start`` to ``stop``, and their rows.

        All are asked for before anyone computes a step, since that replaces the map which they come from.
        """
        if start == 0:
            return [((),) for _ in self.actors]  # everyone has the latent
        steps = self.plan.all_steps[start:stop]
        found = self.sizes[start : stop + 1]
        own = [self.grid.rows(bands, found[0][0]) for bands in self.bands]
        edges = []
        for index, bands in enumerate(self.bands):
            need = exact.needed_rows(steps, self.grid, bands, found)
            others = [
                (i, part) for i, rows in enumerate(own) if i != index and (part := need.common(rows)).size > 0
            ]
            rows = [self.actors[i].copy_rows.remote(part) for i, part in others]
            edges.append((tuple(part for _, part in others), *rows))
        return edges


def _neighbours(spans: Sequence[Span], rows: Sequence[NDArray[Any]]) -> list[Rows]:
    # Ray's arrays cannot be written, which torch warns about.
    return [
        Rows(Span(*span), torch.from_numpy(np.array(part))) for span, part in zip(spans, rows, strict=True)
    ]
