"""Samples of a checkpoint beside a reference set, at one point of a sweep over guidance and steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm.bootstrap import BootstrapConfig
from ldm.comparison import Comparison, Neighbour, compare, nearest_real
from ldm.preprocess import Preprocess
from pipelines.evaluate.images import ImageId
from pipelines.evaluate.pool import EvaluatePool
from pipelines.evaluate.sets import ImageSet, array_set, pictures_of
from pipelines.generate import GeneratePools, Request, generate

__all__ = ["Beside", "Generation", "Reference", "SweepPoint", "beside_nearest", "measure_point"]

# The driver holds this many generated images at a time: 200 MB at 256 px.
CHUNK = 1024
SHARD = "sample"  # of the ids of generated images, whose position is their place among the requests


@dataclass(frozen=True)
class Generation:
    """What makes the images: the checkpoint's folder, the VAE to decode with, the actors."""

    folder: Path
    vae: str
    pools: GeneratePools


@dataclass(frozen=True)
class Reference:
    """What they are compared with: the set, and how it was read; extractor as every node finds it."""

    images: ImageSet
    source: str
    preprocess: Preprocess
    extractor: str


@dataclass(frozen=True)
class SweepPoint:
    """Figures at one guidance and number of steps.

    digest: of all generated images; nearest: of each kept one its nearest reference image, in
    feature space, those furthest from any first.
    """

    guidance: float
    steps: int
    comparison: Comparison
    digest: str
    nearest: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Beside:
    """A sample, the reference image nearest to it, and their distance; pixels (H, W, 3) uint8."""

    sample: NDArray[np.uint8]
    real: NDArray[np.uint8]
    request: Request
    distance: float


def measure_point(
    made_by: Generation,
    requests: Sequence[Request],
    reference: Reference,
    pool: EvaluatePool,
    bootstrap: BootstrapConfig,
    *,
    keep: int,
) -> SweepPoint:
    """Generate the images of ``requests``, all of one guidance and number of steps, and compare them."""
    made = _images(made_by, requests[:CHUNK], 0, reference.extractor, pool, keep)
    for start in range(CHUNK, len(requests), CHUNK):
        chunk = requests[start : start + CHUNK]
        made = made.merge(_images(made_by, chunk, start, reference.extractor, pool, keep))
    real = reference.images.summary
    return SweepPoint(
        requests[0].guidance,
        requests[0].num_inference_steps,
        compare(real, made.summary, bootstrap),
        made.digest,
        tuple(nearest_real(real.sample, made.summary.sample)),
    )


def beside_nearest(
    made_by: Generation, requests: Sequence[Request], reference: Reference, neighbours: Sequence[Neighbour]
) -> list[Beside]:
    """Both pictures of each of ``neighbours``: samples are made again, which gives the same, and not kept."""
    chosen = [requests[ImageId.parse(neighbour.generated).position] for neighbour in neighbours]
    samples = generate(made_by.folder, chosen, made_by.vae, made_by.pools).images
    ids = [ImageId.parse(neighbour.real) for neighbour in neighbours]
    real = pictures_of(reference.source, reference.preprocess, set(ids))
    return [
        Beside(sample, real[name], request, neighbour.distance)
        for sample, name, request, neighbour in zip(samples, ids, chosen, neighbours, strict=True)
    ]


def _images(
    made_by: Generation,
    requests: Sequence[Request],
    start: int,
    extractor: str,
    pool: EvaluatePool,
    keep: int,
) -> ImageSet:
    images = generate(made_by.folder, requests, made_by.vae, made_by.pools).images
    named = [(ImageId(SHARD, start + index), image) for index, image in enumerate(images)]
    return array_set(named, extractor, pool, keep=keep)
