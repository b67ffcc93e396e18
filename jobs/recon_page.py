"""The page of `ldm evaluate recon`: figures, the worst and the median images, the pins."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ldm.bootstrap import Figure
    from pipelines.evaluate import ImageFigures, ImageId, Reconstruction, Rejected

__all__ = ["Chosen", "choose", "difference", "picture_name", "write_page"]

DIFFERENCE_GAIN = 4
MAX_REJECTED = 20
NAME_CHARS = 80  # of a shard, and of a key: together below what file systems allow


class Chosen(NamedTuple):
    """The images to show: the worst, worst first, and those in the middle of the order."""

    metric: str
    worst: "Sequence[ImageFigures]"
    median: "Sequence[ImageFigures]"


def choose(images: "Sequence[ImageFigures]", count: int) -> Chosen:
    """By the perceptual distance where it was computed, else by PSNR."""
    metric = "psnr_db" if images[0].distance is None else "distance"
    sign = 1 if metric == "psnr_db" else -1
    order = sorted(images, key=lambda image: (sign * getattr(image, metric), image.id))
    middle = max((len(order) - count) // 2, 0)
    return Chosen(metric, order[:count], order[middle : middle + count])


def difference(a_HW3: NDArray[np.uint8], b_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """|a − b| · `DIFFERENCE_GAIN`, at most 255."""
    apart: NDArray[np.int16] = np.abs(np.subtract(a_HW3, b_HW3, dtype=np.int16)) * DIFFERENCE_GAIN
    return np.minimum(apart, 255).astype(np.uint8)


def picture_name(image: "ImageFigures") -> str:
    """A file name of its own for every image: keys are strangers', and those of two shards can be equal."""
    shard, key = (re.sub(r"[^A-Za-z0-9._-]", "_", text)[:NAME_CHARS] for text in (image.shard, image.key))
    return f"{shard}-{image.position:06d}-{key}.png"


def write_page(
    path: Path,
    *,
    title: str,
    figures: "Mapping[str, Figure | None]",
    chosen: Chosen,
    pictures: "Mapping[ImageId, Reconstruction]",
    pins: Mapping[str, str],
    rejected: "Sequence[Rejected]",
    level: float,
) -> None:
    """Write the page; the pictures of the chosen images must be among ``pictures``."""
    from jobs.evaluation_view import FIGURES, figure_rows
    from jobs.pages import data_url, render
    from ldm.images import encode_png

    page = render(
        "evaluate_recon.html",
        {
            "png": lambda image: data_url(encode_png(image), "image/png"),
            "told": lambda value, name: FIGURES[name].format.format(value),
        },
        title=title,
        figures=figure_rows(figures),
        level=level,
        metric=chosen.metric,
        metric_name=FIGURES[chosen.metric].name,
        groups={"Worst": _shown(chosen.worst, pictures), "Median": _shown(chosen.median, pictures)},
        difference=difference,
        gain=DIFFERENCE_GAIN,
        pins=pins,
        rejected=rejected[:MAX_REJECTED],
        num_rejected=len(rejected),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _shown(
    images: "Sequence[ImageFigures]", pictures: "Mapping[ImageId, Reconstruction]"
) -> "list[tuple[ImageFigures, Reconstruction]]":
    return [(image, pictures[image.id]) for image in images]
