"""The page of `ldm evaluate samples`: figures over the sweep, samples beside the reference, pins."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ldm.bootstrap import Figure
    from pipelines.evaluate import Rejected
    from pipelines.evaluate.samples import Beside, SweepPoint

__all__ = ["plot", "point_json", "point_line", "write_page"]

MAX_REJECTED = 20
FIGURE_NAMES = ("fid", "kid", "precision", "recall")


def point_line(point: "SweepPoint") -> str:
    """What is printed when a point is measured."""
    from jobs.evaluation_view import figure_rows

    figures = ", ".join(
        f"{row.name} {row.value}" + (f" ({row.interval})" if row.interval else "")
        for row in figure_rows(point.comparison.figures())
    )
    return f"guidance {point.guidance:g}, {point.steps} steps: {figures}"


def point_json(point: "SweepPoint") -> dict[str, object]:
    """As plain values."""
    from jobs.evaluation_view import as_json

    figures = as_json(point.comparison.figures())
    return {"guidance": point.guidance, "steps": point.steps, **figures, "samples_sha256": point.digest}


def write_page(
    path: Path,
    *,
    title: str,
    points: "Sequence[SweepPoint]",
    best: "SweepPoint",
    groups: "Mapping[str, Sequence[Beside]]",
    pins: Mapping[str, str],
    rejected: "Sequence[Rejected]",
    level: float,
) -> None:
    """Write the page; groups: heading → samples beside reference images, of the point ``best``."""
    from jobs.evaluation_view import FIGURES, figure_rows
    from jobs.pages import data_url, render
    from ldm.images import encode_png

    rows = [
        (point, {row.name: row for row in figure_rows(point.comparison.figures())}, point is best)
        for point in points
    ]
    page = render(
        "evaluate_samples.html",
        {"png": lambda image: data_url(encode_png(image), "image/png")},
        title=title,
        rows=rows,
        names=[FIGURES[name] for name in FIGURE_NAMES],
        plot=plot(points),
        best=best,
        groups=groups,
        pins=pins,
        rejected=rejected[:MAX_REJECTED],
        num_rejected=len(rejected),
        level=level,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def plot(points: "Sequence[SweepPoint]") -> str:
    """FID, KID, and recall over precision: one line per number of steps; an SVG as a data URL."""
    from matplotlib.figure import Figure

    from jobs.pages import svg_url

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    fid, kid, coverage = figure.subplots(1, 3)
    for steps in sorted({point.steps for point in points}):
        line = sorted((p for p in points if p.steps == steps), key=lambda p: p.guidance)
        label = f"{steps} steps"
        _curve(fid, line, lambda point: point.comparison.fid, label)
        _curve(kid, line, lambda point: point.comparison.kid, label)
        covered = [
            (c.precision.value, c.recall.value)
            for c in (point.comparison for point in line)
            if c.precision and c.recall
        ]
        if covered:
            coverage.plot(*zip(*covered, strict=True), marker="o", label=label)
    fid.set(xlabel="guidance", ylabel="FID")
    kid.set(xlabel="guidance", ylabel="KID")
    coverage.set(xlabel="precision", ylabel="recall", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    figure.legend(*fid.get_legend_handles_labels(), loc="outside upper center", ncols=8, frameon=False)
    for axes in (fid, kid, coverage):
        axes.grid(alpha=0.3)
    return svg_url(figure)


def _curve(
    axes: "Axes",
    line: "Sequence[SweepPoint]",
    figure_of: "Callable[[SweepPoint], Figure | None]",
    label: str,
) -> None:
    """Values over guidance, with bars where there are intervals."""
    found = [(point.guidance, figure) for point in line if (figure := figure_of(point)) is not None]
    if not found:
        return
    values = [figure.value for _, figure in found]
    # A percentile interval need not hold the value, and matplotlib draws no negative bars.
    below, above = (
        [max(sign * (end - f.value), 0) for _, f in found for end in ((f.interval or (f.value,) * 2)[side],)]
        for side, sign in ((0, -1), (1, 1))
    )
    guidances = [guidance for guidance, _ in found]
    axes.errorbar(guidances, values, yerr=[below, above], marker="o", capsize=3, label=label)
