"""What step-level batching is compared with: ``@serve.batch``, and one request after the other."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from ray import serve

from ldm import unet
from ldm.model_card import ModelCard
from ldm.sampling import denoise_step
from pipelines.serve.loaded_model import trajectory
from pipelines.serve.messages import SampleRequest

__all__ = ["BatchSampler"]

WAIT_S = 0.01


class BatchSampler:
    """Requests that wait at the same time share calls until the last of them is done.

    One that is done earlier leaves the calls at once, so none is larger than it has to be; but it is answered
    with the others, as ``@serve.batch`` has it. max_batch_size 1: one after the other.
    """

    def __init__(self, card: ModelCard, max_batch_size: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.card, self.unet = card, unet.load(card.folder).eval()
        self.thread = ThreadPoolExecutor(1)
        self._batched = serve.batch(max_batch_size=max_batch_size, batch_wait_timeout_s=WAIT_S)(self._sample)

    async def sample(self, request: SampleRequest) -> bytes:
        """The latent."""
        made: bytes = await self._batched(request)
        return made

    async def _sample(self, requests: Sequence[SampleRequest]) -> list[bytes]:
        import asyncio

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.thread, partial(self._run, list(requests)))

    def _run(self, requests: Sequence[SampleRequest]) -> list[bytes]:
        trajectories = [trajectory(self.card, request) for request in requests]
        unfinished = trajectories
        while unfinished:
            denoise_step(self.unet, unfinished)
            unfinished = [trajectory for trajectory in unfinished if not trajectory.done]
        return [trajectory.latent.numpy().tobytes() for trajectory in trajectories]
