"""One large image over several Ray actors: each has some bands of every map, and gives its edge rows away.

The bits are those of one process with as many torch threads: tiles do not depend on the number of actors, and
statistics are merged band by band. What travels are edge rows, statistics and, where the VAE has attention,
keys and values. Every step waits for everyone's statistics, so little may happen between two steps: an actor
returns the edge rows that the next step needs together with the statistics.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

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
from ldm.tiling.maps import Storage, keep_freed
from ldm.tiling.spans import Span
from ldm.tiling.statistics import ChannelMoments
from pipelines.device import pick_device
from pipelines.tile_actors import TileActors
from pipelines.vae_source import on_every_node

__all__ = ["SharedDecoder"]

# Rows of a map, which one actor gives to others.
Edges: TypeAlias = Mapping[Span, NDArray[Any]]


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
        keep_freed()
        self.autoencoder = autoencoder.load(vae).to(pick_device())

    def prepare(self, shape_Chw: Sequence[int], tiling: Tiling, needed_bytes: int) -> None:
        self.storage = Storage(tiling.spill)
        self.storage.require(needed_bytes)
        self.plan = plan(self.autoencoder, shape_Chw, tiling)

    def start(self, latent_Chw: NDArray[Any], bands: range, *, is_small: bool) -> None:
        latent = torch.from_numpy(np.array(latent_Chw))
        start = self.plan.small_runner if is_small else self.plan.runner
        self.runner = start(latent, bands, self.storage)

    @torch.inference_mode()
    def sweep(
        self,
        index: int,
        moments: ChannelMoments | None,
        gives: Sequence[Span],
        takes: Sequence[Span],
        *edges: Edges,
    ) -> tuple[list[ChannelMoments], Edges]:
        """Moments of the bands, and the rows ``gives`` of the map that comes out."""
        found = self.runner.sweep(index, moments, _neighbours(takes, edges))
        return found, self._edges(gives)

    @torch.inference_mode()
    def keys_and_values(self, index: int, moments: ChannelMoments) -> NDArray[Any]:
        keys_and_values: NDArray[Any] = torch.stack(self.runner.keys_and_values(index, moments)).numpy()
        return keys_and_values

    @torch.inference_mode()
    def attend(
        self, index: int, moments: ChannelMoments, gives: Sequence[Span], *parts_2NC: NDArray[Any]
    ) -> tuple[list[ChannelMoments], Edges]:
        keys_NC, values_NC = torch.from_numpy(np.concatenate(parts_2NC, axis=1))
        return self.runner.attend(index, moments, (keys_NC, values_NC)), self._edges(gives)

    def finish(
        self, moments: ChannelMoments | None, small: MomentsByStep, takes: Sequence[Span], *edges: Edges
    ) -> Iterator[tuple[Span, NDArray[Any]]]:
        with torch.inference_mode():
            neighbours = _neighbours(takes, edges)
            for span, values_rWC in self.plan.finish(self.runner, moments, small, neighbours):
                yield span, values_rWC.numpy()

    def _edges(self, gives: Sequence[Span]) -> Edges:
        return {span: self.runner.copy_rows(span).numpy() for span in gives}


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
        return self._gather(
            actor.sweep.options(num_returns=2).remote(index, moments, gives, *taken)
            for actor, gives, taken in zip(
                self.actors, self._gives(index + 1), self._taken(index), strict=True
            )
        )

    def attend(self, index: int, moments: ChannelMoments) -> list[ChannelMoments]:
        keys_and_values = [actor.keys_and_values.remote(index, moments) for actor in self.actors]
        return self._gather(
            actor.attend.options(num_returns=2).remote(index, moments, gives, *keys_and_values)
            for actor, gives in zip(self.actors, self._gives(index + 1), strict=True)
        )

    def finish(self, moments: ChannelMoments | None, small: MomentsByStep) -> Iterator[Rows]:
        # No bound on what is ahead: whoever has the lower bands would wait for those above to be taken.
        streams = [
            actor.finish.options(num_returns="streaming").remote(moments, small, *taken)
            for actor, taken in zip(self.actors, self._taken(len(self.plan.stages[0])), strict=True)
        ]
        for stream in streams:
            for band in stream:
                span, values_rWC = ray.get(band)
                yield Rows(Span(*span), torch.from_numpy(np.array(values_rWC)))

    def _gather(self, returned: Iterable[tuple[Any, Any]]) -> list[ChannelMoments]:
        """Everyone's moments; the edges are the next step's."""
        moments, self.edges = zip(*returned, strict=True)
        return [band for part in ray.get(list(moments)) for band in part]

    def _gives(self, index: int) -> list[list[Span]]:
        """For each actor: rows of the input of step ``index`` that others need."""
        shares = self._shares(index)
        return [[share.rows for share in shares if share.giver == i] for i in range(len(self.actors))]

    def _taken(self, index: int) -> list[tuple[Any, ...]]:
        """For each actor: rows of others that it needs to compute step ``index``, and who gave them."""
        shares = self._shares(index)
        taken = [[share for share in shares if share.taker == i] for i in range(len(self.actors))]
        return [
            ([share.rows for share in found], *(self.edges[share.giver] for share in found))
            for found in taken
        ]

    def _shares(self, index: int) -> "list[Share]":
        """What is given for step ``index``, with which, in the end, all steps come that `finish` computes."""
        steps = self.plan.all_steps
        stop = len(steps) if index == len(self.plan.stages[0]) and not self.is_small else index + 1
        if index == 0 or index == len(steps):
            return []  # everyone has the latent, and nobody needs the image
        found = self.sizes[index : stop + 1]
        own = [self.grid.rows(bands, found[0][0]) for bands in self.bands]
        needs = [exact.needed_rows(steps[index:stop], self.grid, bands, found) for bands in self.bands]
        return [
            Share(giver, taker, rows)
            for taker, need in enumerate(needs)
            for giver, has in enumerate(own)
            if giver != taker and (rows := need.common(has)).size > 0
        ]


class Share(NamedTuple):
    """Rows of a map that one actor gives to another."""

    giver: int
    taker: int
    rows: Span


def _neighbours(takes: Sequence[Span], edges: Sequence[Edges]) -> list[Rows]:
    # Ray's arrays cannot be written, which torch warns about.
    return [
        Rows(span, torch.from_numpy(np.array(given[span]))) for span, given in zip(takes, edges, strict=True)
    ]
