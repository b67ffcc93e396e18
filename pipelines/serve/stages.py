"""The stages of a server, called: a replica that dies costs its caller some time, and nothing else."""

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from pipelines.serve.hold_off import HoldOff
from pipelines.serve.messages import (
    Condition,
    DecodeRequest,
    Paste,
    Progress,
    Rejected,
    SampleEvent,
    SampleRequest,
    UpsampleRequest,
)
from pipelines.serve.step_costs import LatentShape

__all__ = ["Handle", "StageFailed", "Stages", "StagesObserver"]

Result = TypeVar("Result")
Handle: TypeAlias = DeploymentHandle[Any]
Latent = NDArray[np.float32]

# A replica that dies is tried again elsewhere; two in a row are another problem.
ATTEMPTS = 2
DEATHS = (RayActorError, ObjectLostError)
QUEUE_FULL_RETRY_S = 1.0


class StageFailed(Exception):
    """A stage died, or its replicas did, as often as it was tried."""


class StagesObserver:
    """Is told what happens, for metrics."""

    def retried(self, stage: str) -> None:
        """A replica of it died, and it is tried again."""

    def held_off(self) -> None:
        """A request was refused in a full sampler's name."""


class Stages:
    """Handles of the deployments."""

    def __init__(
        self,
        conditioner: Handle | None,
        sampler: Handle,
        upsamplers: Sequence[Handle],
        decoder: Handle,
        observer: StagesObserver | None = None,
    ) -> None:
        self._conditioner, self._decoder = conditioner, decoder
        self._observer = observer or StagesObserver()
        self._sampler = sampler.options(stream=True)
        self._samplers: dict[str, Handle] = {}
        self._hold_offs = defaultdict[tuple[str, LatentShape], HoldOff](
            lambda: HoldOff(self._observer.held_off)
        )
        self._upsamplers = [handle.options(stream=True) for handle in upsamplers]

    async def conditions(self, model: str, texts: Sequence[str]) -> list[Condition] | str:
        """Of texts; or what is wrong with one."""
        handle = self._conditioner
        assert handle is not None

        async def call() -> list[Condition] | str:
            found: list[Condition] | str = await handle.encode.remote(model, texts)
            return found

        return await self._again("conditioner", call)

    def refusal(self, model: str, shape: LatentShape) -> Rejected | None:
        """What the sampler would say to such a request now, where that is known."""
        return self._hold_offs[model, shape].refusal()

    def sample(self, request: SampleRequest) -> AsyncIterator[SampleEvent]:
        """As `pipelines.serve.sampler.Sampler.sample`. Made again, it is the same image."""
        return self._hold_offs[request.model, request.shape].events(lambda: self._asked(request))

    async def _asked(self, request: SampleRequest) -> AsyncIterator[SampleEvent]:
        if request.model not in self._samplers:
            self._samplers[request.model] = self._sampler.options(multiplexed_model_id=request.model)
        handle = self._samplers[request.model]
        try:
            async for event in self._stream("sampler", lambda: handle.sample.remote(request)):
                yield event
        except BackPressureError:
            yield Rejected("full", QUEUE_FULL_RETRY_S)

    async def upsample(self, request: UpsampleRequest, low_Chw: Latent) -> AsyncIterator[Progress | Latent]:
        """Progress, and at the end the latent, by the request's stage."""
        handle, stage = self._upsamplers[request.stage - 1], f"upsampler {request.stage}"
        async for event in self._stream(stage, lambda: handle.upsample.remote(request, low_Chw)):
            yield event if isinstance(event, Progress) else await event

    async def encode(self, model: str, image_HW3: NDArray[np.uint8]) -> Latent:
        """An image's latent, in the VAE's own scale."""

        async def call() -> Latent:
            latent_Chw: Latent = await self._decoder.encode.remote(model, image_HW3)
            return latent_Chw

        return await self._again("decoder", call)

    async def decode(self, request: DecodeRequest, latent_Chw: Latent, paste: Paste | None = None) -> bytes:
        """The image's file."""

        async def call() -> bytes:
            reference = await self._decoder.decode.remote(request, latent_Chw, paste)
            file: bytes = await reference
            return file

        return await self._again("decoder", call)

    async def decode_for_job(
        self, request: DecodeRequest, latent_Chw: Latent, job_id: str
    ) -> tuple[int, int]:
        """As `pipelines.serve.decoder.Decoder.decode_for_job`."""
        # Once, and not once for each attempt.
        reference = ray.put(latent_Chw)

        async def call() -> tuple[int, int]:
            size: tuple[int, int] = await self._decoder.decode_for_job.remote(request, reference, job_id)
            return size

        return await self._again("decoder", call)

    async def _again(self, stage: str, call: Callable[[], Awaitable[Result]]) -> Result:
        for _ in range(ATTEMPTS - 1):
            with suppress(*DEATHS):
                return await call()
            self._observer.retried(stage)
        try:
            return await call()
        except DEATHS as error:
            raise StageFailed(f"{stage} failed {ATTEMPTS} times") from error

    async def _stream(self, stage: str, call: Callable[[], Any]) -> AsyncIterator[Any]:
        """Events of a call, and where it dies those of another one. Whoever stops listening cancels it."""
        for attempt in range(ATTEMPTS):
            response = call()
            try:
                async for event in response:
                    yield event
                return
            except DEATHS as error:
                if attempt == ATTEMPTS - 1:
                    raise StageFailed(f"{stage} failed {ATTEMPTS} times") from error
                self._observer.retried(stage)
            finally:
                response.cancel()
