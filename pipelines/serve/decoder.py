"""The decoder stage: latents → image files, whole or in tiles, in replicas that hold the VAEs."""

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import ObjectRef
from torch import Tensor

from ldm import autoencoder as autoencoders
from ldm.autoencoder import Autoencoder
from ldm.image_rows import write_image
from ldm.image_tensors import from_model, to_model
from ldm.model_card import ModelCard
from ldm.tiling.config import Tiling
from ldm.tiling.decode import decode_rows
from pipelines.device import pick_device
from pipelines.serve.config import ServeConfig
from pipelines.serve.deep_zoom import write_tiles
from pipelines.serve.device_thread import device_thread
from pipelines.serve.image_files import CONTENT_TYPES, encode_image, reencode
from pipelines.serve.job_store import JobStore
from pipelines.serve.messages import DecodeRequest, Paste
from pipelines.serve.stage_metrics import StageMetrics
from pipelines.serve.tracing import current_span, describe
from pipelines.serve.work_left import WorkMeter

__all__ = ["Decoder"]

Result = TypeVar("Result")

# Until the first was measured.
FIRST_GUESS_S_PER_PX = 1e-6
ROWS_AT_A_TIME = 16


class Decoder:
    """Replica. cards: by model, of which the first's VAE is loaded at the start."""

    def __init__(self, cards: Mapping[str, ModelCard], config: ServeConfig) -> None:
        if config.decoder.threads:
            torch.set_num_threads(config.decoder.threads)
        self.cards, self.config, self.device = cards, config, pick_device()
        self.thread = device_thread("vae")
        self.meter, self.metrics = WorkMeter(FIRST_GUESS_S_PER_PX), StageMetrics("decoder")
        self._autoencoders: dict[str, Autoencoder] = {}
        self._autoencoder(next(iter(cards)))

    async def encode(self, model: str, image_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The latent (C, h, w) of an image whose sides are multiples of f: the mean of its posterior."""

        def call() -> NDArray[np.float32]:
            moments = self._autoencoder(model).encode(to_model(image_HW3[None]).to(self.device))
            latent_Chw: NDArray[np.float32] = moments.mode()[0].cpu().numpy()
            return latent_Chw

        return await self._in_turn(image_HW3[..., 0].size, call)

    async def decode(
        self, request: DecodeRequest, latent_Chw: NDArray[np.float32], paste: Paste | None = None
    ) -> "ObjectRef[bytes]":
        """The image's file, by reference; what ``paste`` keeps is put into it."""
        latent = torch.tensor(latent_Chw)
        pixels = self._num_pixels(request, latent)
        return ray.put(await self._in_turn(pixels, lambda: self._file(request, latent, paste)))

    async def decode_for_job(
        self, request: DecodeRequest, latent_Chw: NDArray[np.float32], job_id: str
    ) -> tuple[int, int]:
        """Put the image, and its tiles to look at, into the store; returns its height and width in px.

        It is never in memory as a whole.
        """
        latent = torch.tensor(latent_Chw)
        pixels = self._num_pixels(request, latent)
        return await self._in_turn(pixels, lambda: self._store(request, latent, job_id))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `pipelines.serve.work_left.WorkLeft`."""
        return self.meter.stats()

    def _num_pixels(self, request: DecodeRequest, latent_Chw: Tensor) -> int:
        return latent_Chw[0].numel() * self.cards[request.model].f ** 2

    async def _in_turn(self, pixels: int, call: Callable[[], Result]) -> Result:
        work, span, asked = self.meter.begin(pixels), current_span(), time.perf_counter()

        def measured() -> Result:
            started = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - started
            self.meter.measured(pixels, seconds)
            self.metrics.done(seconds)
            describe(span, pixels=pixels, queue_s=started - asked, work_s=seconds)
            return result

        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, measured)
        finally:
            self.meter.end(work)

    def _file(self, request: DecodeRequest, latent_Chw: Tensor, paste: Paste | None) -> bytes:
        image_HW3 = np.concatenate(list(self._pixels(request.model, latent_Chw)))
        if paste is not None:
            height, width = paste.mask_HW.shape
            image_HW3 = np.where(paste.mask_HW[..., None], image_HW3[:height, :width], paste.image_HW3)
        return encode_image(image_HW3, request.format, request.quality)

    def _store(self, request: DecodeRequest, latent_Chw: Tensor, job_id: str) -> tuple[int, int]:
        f, store = self.cards[request.model].f, JobStore(self.config.jobs.url)
        size = (latent_Chw.shape[1] * f, latent_Chw.shape[2] * f)
        with tempfile.TemporaryDirectory() as folder:
            image, tiles = Path(folder) / "image.png", Path(folder) / "tiles"
            write_image(image, self._pixels(request.model, latent_Chw), size)
            write_tiles(image, tiles)
            store.put_tiles(job_id, tiles)
            store.put_result(
                job_id, reencode(image, request.format, request.quality), CONTENT_TYPES[request.format]
            )
        return size

    @torch.inference_mode()
    def _pixels(self, model: str, latent_Chw: Tensor) -> Iterator[NDArray[np.uint8]]:
        """The image's rows (rows, W, 3) from the top."""
        autoencoder = self._autoencoder(model)
        for band in decode_rows(autoencoder, latent_Chw, self._tiling(autoencoder, latent_Chw)):
            for part_rWC in torch.split(band.values_rWC, ROWS_AT_A_TIME):
                yield from_model(part_rWC.permute(2, 0, 1)[None])[0]

    def _tiling(self, autoencoder: Autoencoder, latent_Chw: Tensor) -> Tiling:
        side_px = max(latent_Chw.shape[1:]) * autoencoder.f
        tiling = self.config.tiling
        return (
            tiling.model_copy(update={"mode": "whole"}) if side_px <= self.config.whole_up_to_px else tiling
        )

    def _autoencoder(self, model: str) -> Autoencoder:
        source = self.cards[model].vae
        if source not in self._autoencoders:
            self._autoencoders[source] = autoencoders.load(source).to(self.device)
        return self._autoencoders[source]
