"""Images to the encoder's device; on CUDA the next batch is copied while the present one is computed."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Uploader"]

Pixels = NDArray[np.uint8]


class Uploader:
    """Brings batches to a device, one ahead. Pixels travel as uint8: a quarter of the bytes of float32.

    The CUDA lines have never run on a GPU; the order of calls is the same on every device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ahead: tuple[Sequence[Pixels], torch.Tensor] | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def start(self, images: Sequence[Pixels]) -> None:
        """Begin to copy the batch that `take` will be asked for next; to be called once kernels run."""
        self._ahead = None
        # `take` tries again, where a lack of memory is handled and the present batch is out of the way.
        with suppress(torch.OutOfMemoryError):
            self._ahead = (images, self._copy(images))

    def take(self, images: Sequence[Pixels]) -> torch.Tensor:
        """uint8 (B, H, W, 3) on the device, ready for its current stream."""
        ahead, self._ahead = self._ahead, None
        batch = ahead[1] if ahead is not None and _are_same(ahead[0], images) else self._copy(images)
        if self._copies is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copies)
            batch.record_stream(current)
        return batch

    def _copy(self, images: Sequence[Pixels]) -> torch.Tensor:
        batch = torch.from_numpy(np.stack(images))
        if self._copies is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._copies):
            return batch.pin_memory().to(self.device, non_blocking=True)


def _are_same(ahead: Sequence[Pixels], images: Sequence[Pixels]) -> bool:
    return len(ahead) == len(images) and all(a is b for a, b in zip(ahead, images, strict=True))
