"""A pool of Ray actors that hold an upsampler's U-Net and predict batches of windows."""

import math
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from ray.util import ActorPool
from torch import Tensor

from ldm import unet
from ldm.cascade import Denoise, Upsampler, WindowBatch, WindowDenoiser
from ldm.errors import UserError
from pipelines.device import pick_device

__all__ = ["WindowPool", "require_room", "window_actors"]

Array = NDArray[np.float32]


class WindowPool(BaseModel):
    """The actors that predict windows. Their number changes no bit of the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: PositiveInt = Field(1, description="actors")
    num_cpus: PositiveFloat = Field(1.0, description="CPUs of each, and its torch threads")
    num_gpus: NonNegativeFloat = Field(0.0, description="GPUs of each; fractions share one")

    @property
    def threads(self) -> int:
        """Fixed, because the number of threads can change the last bits of a convolution."""
        return max(1, math.floor(self.num_cpus))


class WindowActor:
    """A process with a device, and on it the U-Net of the stage that runs."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.denoiser: WindowDenoiser | None = None

    def load(self, upsampler: Upsampler) -> None:
        """Put this upsampler in the place of the one before."""
        self.denoiser = None
        model = unet.load(upsampler.folder)
        if unet.fingerprint(model) != upsampler.fingerprint:
            raise UserError(
                f"{upsampler.folder} on node {platform.node()} is another checkpoint than on the driver",
                do="give every node the same files",
            )
        self.denoiser = WindowDenoiser(model.to(pick_device()), upsampler.info)

    def predict(self, x_NChw: Array, timestep: float, level: int) -> Array:
        """Predictions (N, C, h, w) of the loaded upsampler."""
        assert self.denoiser is not None
        # A copy: arrays from Ray's object store are read-only.
        prediction_NChw: Array = self.denoiser(WindowBatch(torch.tensor(x_NChw), timestep, level)).numpy()
        return prediction_NChw


@contextmanager
def window_actors(pool: WindowPool) -> Iterator[Callable[[Upsampler], Denoise]]:
    """Yields a function: upsampler → what predicts its windows, on all actors of the pool.

    One upsampler at a time. The actors are gone afterwards.
    """
    kind = ray.remote(WindowActor).options(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus)
    actors: list[Any] = [kind.remote(pool.threads) for _ in range(pool.size)]
    workers = ActorPool(actors)

    def open_stage(upsampler: Upsampler) -> Denoise:
        # Absolute: actors have another working directory.
        found = replace(upsampler, folder=upsampler.folder.absolute())
        ray.get([actor.load.remote(found) for actor in actors])
        return denoise

    def denoise(batches: Iterable[WindowBatch]) -> Iterable[Tensor]:
        # `map`, not `map_unordered`: what is averaged in another order has other bits.
        predicted = workers.map(
            lambda actor, batch: actor.predict.remote(batch.x_NChw.numpy(), batch.timestep, batch.level),
            list(batches),
        )
        return (torch.tensor(prediction_NChw) for prediction_NChw in predicted)

    try:
        yield open_stage
    finally:
        for actor in actors:
            ray.kill(actor)


def require_room(pool: WindowPool) -> None:
    """UserError where the connected cluster can never run the pool; it would wait for ever."""
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray's own
    for name, each in (("CPU", pool.num_cpus), ("GPU", pool.num_gpus)):
        if each * pool.size > have.get(name, 0.0):
            raise UserError(
                f"the pool needs {each * pool.size:g} {name}s, and the cluster has {have.get(name, 0.0):g}",
                do=f"lower --pool.size or --pool.num-{name.lower()}s, or use a larger cluster",
            )
