"""Images of many sizes through one VAE, some at a time, and on when memory runs out or a batch kills."""

from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.autoencoder import Autoencoder
from ldm.errors import BadSampleError
from ldm.image_tensors import to_model
from pipelines.encode.attempts import Attempt
from pipelines.encode.pools import EncoderPool
from pipelines.encode.upload import Uploader

__all__ = ["ImageEncoder", "is_out_of_memory"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Added to an image's index, marks that it was encoded alone.
ALONE = 1 << 32

MomentPair = tuple[torch.Tensor, torch.Tensor]
Pixels = NDArray[np.uint8]


class ImageEncoder:
    """A VAE on its device, and the micro-batch that it has memory for."""

    def __init__(self, autoencoder: Autoencoder, pool: EncoderPool, device: torch.device) -> None:
        self.device, self.precision = device, PRECISIONS[pool.precision]
        self.uploader = Uploader(device)
        self.micro_batch = pool.micro_batch
        self._upcoming: list[Pixels] = []
        self.autoencoder = autoencoder.to(device, channels_last=pool.channels_last)
        if pool.compile:
            # In place: the module keeps its class and its config.
            self.autoencoder.vae.encoder.compile()

    def encode(self, images_N: Sequence[Pixels], attempt: Attempt) -> list[MomentPair | BadSampleError]:
        """(mean, std) float32 (C, h, w) on the CPU of every image, in order; or why there is none.

        images_N: uint8 (H, W, 3). Images of one size meet in batches in their order, so that which
        of them share a batch depends on the unit alone. Reasons: ``killed_worker``, ``out_of_memory``.
        """
        found: dict[int, MomentPair | BadSampleError] = {}
        by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, image in enumerate(images_N):
            by_size[image.shape].append(index)
        waiting = deque(by_size.values())
        while waiting:
            indices = waiting.popleft()
            batch, rest = indices[: self.micro_batch], indices[self.micro_batch :]
            if rest:
                waiting.appendleft(rest)
            upcoming = waiting[0][: self.micro_batch] if waiting else ()
            self._upcoming = [images_N[index] for index in upcoming]
            moments = self._encode_batch([images_N[index] for index in batch], batch, attempt)
            found.update(zip(batch, moments, strict=True))
        return [found[index] for index in range(len(images_N))]

    def _encode_batch(
        self, images: list[Pixels], indices: Sequence[int], attempt: Attempt
    ) -> list[MomentPair | BadSampleError]:
        """One batch; as halves where memory is short; image by image where it killed its worker."""
        if attempt.is_convicted(indices[0]) and len(images) > 1:
            return [self._encode_suspect(*pair, attempt) for pair in zip(images, indices, strict=True)]
        attempt.mark.at(indices[0])
        if (moments := self._try(images)) is not None:
            return list(moments)
        if len(images) == 1:
            return [_too_large(images[0])]
        half = (len(images) + 1) // 2
        self.micro_batch = min(self.micro_batch, half)
        return [
            *self._encode_batch(images[:half], indices[:half], attempt),
            *self._encode_batch(images[half:], indices[half:], attempt),
        ]

    def _encode_suspect(self, image: Pixels, index: int, attempt: Attempt) -> MomentPair | BadSampleError:
        """An image of a batch that has killed its worker every time; one more death convicts it."""
        if attempt.deaths.get(ALONE + index):
            return BadSampleError("killed_worker", "an encoder died at it, in its batch and alone")
        attempt.mark.at(ALONE + index)
        moments = self._try([image])
        return moments[0] if moments is not None else _too_large(image)

    def _try(self, images: Sequence[Pixels]) -> list[MomentPair] | None:
        """Moments of one batch, or None where there is no memory for it."""
        try:
            return self._moments(images)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: while it runs, the traceback keeps the failed call's tensors alive.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _moments(self, images: Sequence[Pixels]) -> list[MomentPair]:
        pairs = self._forward(images, self.precision)
        if self.precision is torch.float32:
            return pairs
        # bf16 and fp16 overflow where fp32 does not, in early layers above all.
        for index, (mean, std) in enumerate(pairs):
            if not (mean.isfinite().all() and std.isfinite().all()):
                (pairs[index],) = self._forward([images[index]], torch.float32)
        return pairs

    def _forward(self, images: Sequence[Pixels], precision: torch.dtype) -> list[MomentPair]:
        images_B3HW = to_model(self.uploader.take(images))
        low = precision is not torch.float32
        with torch.autocast(self.device.type, dtype=precision if low else None, enabled=low):
            moments = self.autoencoder.encode(images_B3HW)
        if self._upcoming:
            # Now, while the device computes and before the host waits for it.
            self.uploader.start(self._upcoming)
        return list(zip(moments.mean_BChw.cpu(), moments.std_BChw.cpu(), strict=True))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host could not allocate: torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _too_large(image: Pixels) -> BadSampleError:
    return BadSampleError("out_of_memory", f"{image.shape[1]}×{image.shape[0]} pixels, alone in its batch")
