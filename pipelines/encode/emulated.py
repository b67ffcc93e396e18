"""An encoder that costs the time it is told to: for benchmarks and fault tests of everything around it.

Its latents are the image averaged over f×f pixels, so that every row can be checked. No torch.
"""

import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm.channel_stats import LatentStats
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import StoredStats
from pipelines.encode.actors import CommittingEncoder
from pipelines.encode.attempts import Attempt, Register
from pipelines.encode.rows import DecodedUnit, EncodedUnit, EncoderTrace

__all__ = ["EmulatedEncoder", "averaged"]

STD = np.float16(0.125)


class EmulatedEncoder(CommittingEncoder):
    """In the place of a VAE actor; takes a stated time per image.

    log: a file that gets a line ``<monotonic seconds> <pid> <begun or encoded> <unit>`` before and after
    each unit.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        register: Register,
        f: int = 8,
        seconds_per_image: float = 0.0,
        log: str | None = None,
    ) -> None:
        super().__init__(dataset, register)
        self.f, self.seconds_per_image = f, seconds_per_image
        self.log = None if log is None else Path(log)

    def encode(self, unit: DecodedUnit, this_attempt: Attempt) -> EncodedUnit:
        """Wait, average, and account for the unit just as a VAE actor does."""
        started_at, start = time.time(), time.perf_counter()
        self._note("begun", unit)
        means: list[NDArray[np.float16]] = []
        for index, image in enumerate(unit.images_N):
            this_attempt.mark.at(index)
            means.append(averaged(image, self.f))
        time.sleep(max(0.0, start + self.seconds_per_image * len(means) - time.perf_counter()))
        self._note("encoded", unit)
        return EncodedUnit(
            unit=unit.unit,
            num_inputs=unit.num_inputs,
            rejected=unit.rejected,
            samples=unit.samples,
            stats=_stats(means),
            decode_s=unit.decode_s,
            trace=EncoderTrace(
                platform.node(), os.getpid(), "emulated", started_at, time.perf_counter() - start
            ),
            means_N=means,
            stds_N=[np.full_like(mean, STD) for mean in means],
            texts=unit.texts,
            embeddings_T=unit.embeddings_T,
        )

    def _note(self, event: str, unit: DecodedUnit) -> None:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{time.monotonic():.6f} {os.getpid()} {event} {unit.unit.id}\n")


def averaged(image_HW3: NDArray[np.uint8], f: int) -> NDArray[np.float16]:
    """uint8 (H, W, 3) → float16 (3, H/f, W/f) in [-1, 1]."""
    height, width, _ = image_HW3.shape
    tiles = image_HW3.reshape(height // f, f, width // f, f, 3).mean((1, 3), dtype=np.float64)
    return np.ascontiguousarray((tiles / 127.5 - 1).transpose(2, 0, 1).astype(np.float16))


def _stats(means: Sequence[NDArray[np.float16]]) -> StoredStats | None:
    if not means:
        return None
    parts = []
    for mean in means:
        values_CN = mean.reshape(mean.shape[0], -1).astype(np.float64)
        count, centre_C = values_CN.shape[1], values_CN.mean(1)
        m2_C = ((values_CN - centre_C[:, None]) ** 2).sum(1) + count * float(STD) ** 2
        parts.append(LatentStats(count, tuple(centre_C.tolist()), tuple(m2_C.tolist())))
    merged = LatentStats.merge_all(parts)
    assert math.isfinite(sum(merged.m2_C))
    return StoredStats(count=merged.count, mean=merged.mean_C, m2=merged.m2_C)
