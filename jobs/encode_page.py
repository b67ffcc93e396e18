"""The page that `ldm encode` leaves behind: what one run did, and how fast."""

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from pipelines.encode.report import EncodeSummary, UnitReport

if TYPE_CHECKING:
    from pipelines.dataset import LatentDataset

__all__ = ["Throughput", "publish_page"]

MAX_BINS = 240


class Throughput:
    """Images over time, in bins of equal width; when there are too many, each two become one."""

    def __init__(self) -> None:
        self.started_at = time.time()
        self.width_s = 1.0
        self.images: list[int] = []

    def add(self, report: UnitReport) -> None:
        """One more unit, committed now."""
        self.add_at(time.time() - self.started_at, report.images)

    def add_at(self, elapsed_s: float, images: int) -> None:
        """Images committed ``elapsed_s`` after the start."""
        while (index := int(elapsed_s / self.width_s)) >= MAX_BINS:
            self.images = [sum(self.images[at : at + 2]) for at in range(0, len(self.images), 2)]
            self.width_s *= 2
        self.images += [0] * (index + 1 - len(self.images))
        self.images[index] += images

    def rates(self) -> tuple[list[float], list[float]]:
        """(start of a bin in s, images/s in it); the last rate is repeated at the last bin's end."""
        starts = [index * self.width_s for index in range(len(self.images) + 1)]
        rates = [images / self.width_s for images in self.images]
        return starts, [*rates, *rates[-1:]]


def publish_page(
    dataset: "LatentDataset", summary: EncodeSummary, throughput: Throughput, source: str, output: str
) -> str:
    """Write ``runs/<time>.html`` into the dataset; returns its path there."""
    from jobs.pages import render, svg_of_line

    begun = datetime.fromtimestamp(throughput.started_at, UTC)
    page = render(
        "encode.html",
        summary=summary,
        input=source,
        output=output,
        vae=f"{dataset.header.vae} ({dataset.header.vae_fingerprint[:12]})",
        begun=f"{begun:%Y-%m-%d %H:%M:%S} UTC",
        duration=str(timedelta(seconds=round(summary.seconds))),
        curve=svg_of_line(*throughput.rates(), "seconds", "images/s", steps=True),
    )
    path = f"runs/{begun:%Y%m%dT%H%M%SZ}.html"
    dataset.publish(path, page.encode(), rows=0)
    return path
