"""What ``ldm evaluate by-f`` shows: quality over bits per pixel and speed, as plot, table and page."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.bootstrap import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pipelines.evaluate import Rejected

__all__ = ["Point", "draw", "point_json", "print_points", "write_page"]

BITS = {"float16": 16, "int8": 8}
MARKERS = {"float16": "o", "int8": "s"}
QUALITY = ("psnr_db", "ssim", "ms_ssim")
MAX_REJECTED = 20


@dataclass(frozen=True)
class Point:
    """A VAE with its latents stored in one form (a key of `BITS`). figures: name → mean over the images."""

    vae: str
    f: int
    channels: int
    form: str
    figures: Mapping[str, Figure]
    images_per_s: float

    @property
    def bits_per_pixel(self) -> float:
        """Of the values alone: int8 has a scale per channel and image beside them."""
        return self.channels * BITS[self.form] / self.f**2


def point_json(point: Point) -> dict[str, object]:
    from jobs.evaluation_view import as_json

    names = ("vae", "f", "channels", "form", "bits_per_pixel", "images_per_s")
    missing = dict.fromkeys(QUALITY)
    return {name: getattr(point, name) for name in names} | missing | as_json(point.figures)


def rows_of(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; MS-SSIM is empty where the images are too small for it."""
    from jobs.evaluation_view import FIGURES

    headings = ["VAE", "f", "channels", "latents", "bits per pixel", *(FIGURES[q].name for q in QUALITY)]
    rows = []
    for point in points:
        quality = [
            FIGURES[name].format.format(point.figures[name].value) if name in point.figures else ""
            for name in QUALITY
        ]
        cells = [point.vae, str(point.f), str(point.channels), point.form, f"{point.bits_per_pixel:g}"]
        rows.append([*cells, *quality, f"{point.images_per_s:.3g}"])
    return [*headings, "images/s"], rows


def print_points(points: Sequence[Point]) -> None:
    from rich.console import Console
    from rich.table import Table

    headings, rows = rows_of(points)
    table = Table(*headings)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def draw(points: Sequence[Point]) -> bytes:
    """The plot as PNG: a panel for each measure of quality that there is, and one of images/s."""
    from matplotlib.figure import Figure as Canvas

    from jobs.evaluation_view import FIGURES

    names = [name for name in QUALITY if all(name in point.figures for point in points)]
    figure = Canvas(figsize=(3.6 * (len(names) + 1), 3.8), layout="constrained")
    *panels, speed = figure.subplots(1, len(names) + 1)
    for axes, name in zip(panels, names, strict=True):
        _quality(axes, points, name)
        axes.set(ylabel=FIGURES[name].name)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=8, frameon=False)
    by_vae = {point.vae: point for point in points}
    speed.bar(
        [_label(vae) for vae in by_vae],
        [point.images_per_s for point in by_vae.values()],
        color=[f"C{number}" for number in range(len(by_vae))],
    )
    speed.set(ylabel="images/s, encode and decode")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _quality(axes: "Axes", points: Sequence[Point], name: str) -> None:
    for number, vae in enumerate(dict.fromkeys(point.vae for point in points)):
        line = [point for point in points if point.vae == vae]
        bits = [point.bits_per_pixel for point in line]
        axes.plot(bits, [point.figures[name].value for point in line], color=f"C{number}", label=_label(vae))
        for point in line:
            value = point.figures[name].value
            axes.plot(point.bits_per_pixel, value, color=f"C{number}", marker=MARKERS[point.form])
            axes.annotate(
                point.form, (point.bits_per_pixel, value), (4, 4), textcoords="offset points", size=7
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("bits per pixel")
    axes.margins(0.2)
    axes.grid(alpha=0.3)


def _label(vae: str) -> str:
    return vae.rstrip("/").rsplit("/", 1)[-1]


def write_page(
    path: Path,
    points: Sequence[Point],
    png: bytes,
    pins: Mapping[str, str],
    rejected: "Sequence[Rejected]",
    level: float,
) -> None:
    from jobs.evaluation_view import figure_rows
    from jobs.pages import data_url, render

    headings, rows = rows_of(points)
    page = render(
        "evaluate_by_f.html",
        headings=headings,
        rows=rows,
        plot=data_url(png, "image/png"),
        groups={f"{point.vae}, {point.form}": figure_rows(point.figures) for point in points},
        pins=pins,
        rejected=rejected[:MAX_REJECTED],
        num_rejected=len(rejected),
        level=level,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
