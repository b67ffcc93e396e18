"""The page of ``ldm savings``: the savings by f as a plot, and all tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.savings_view import SavingsResult, Sheet, sheets
from ldm.savings_claims import CLAIMS, Claim, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_page", "write_reduced_page"]

COLOURS = ("#2563eb", "#0891b2", "#dc2626", "#ea580c", "#7c3aed", "#65a30d", "#0f766e", "#a16207")
LATENT_F = (4, 8, 16)


def write_page(path: Path, result: SavingsResult) -> None:
    """The page of the ledgers."""
    introduction = (
        f"{result.counted_name}: counted on the meta device, never run here. {result.run_here_name}: "
        "counted, and run on this machine where a table says “measured”. f = 1 are the pixels themselves."
    )
    _write(path, "What latents save", introduction, sheets(result), _plot(result.series))


def write_reduced_page(path: Path, found: Sequence[Sheet]) -> None:
    """The page of ``--quantise``."""
    _write(path, "What narrower numbers save", "", found, "")


def _write(path: Path, title: str, introduction: str, found: Sequence[Sheet], plot: str) -> None:
    from jobs.pages import render

    page = render("savings.html", title=title, introduction=introduction, plot=plot, sheets=found)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _plot(series: Sequence[Series]) -> str:
    """Savings of compute and shares of memory by f, as a data URL."""
    from matplotlib.figure import Figure

    from jobs.pages import svg_url

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    compute, memory = figure.subplots(1, 2)
    _lines(compute, [one for one in series if one.kind == "compute"], "compute")
    _lines(memory, [one for one in series if one.kind == "memory"], "memory")
    compute.set(ylabel="times less than on pixels", title="Compute of a step")
    memory.set(ylabel="share of f = 4", title="Memory of a step")
    return svg_url(figure)


def _lines(axes: "Axes", series: Sequence[Series], kind: str) -> None:
    for one, colour in zip(series, COLOURS, strict=False):
        base = 4 if kind == "memory" else 1
        values = [Claim(one.kind, f, base, 0, 0).value(one.by_f) for f in LATENT_F]
        axes.plot(LATENT_F, values, marker="o", color=colour, label=one.name)
    claims = [claim for claim in CLAIMS if claim.kind == kind]
    middle = [(claim.low + claim.high) / 2 for claim in claims]
    spread = [(claim.high - claim.low) / 2 for claim in claims]
    axes.errorbar(
        [claim.f for claim in claims], middle, spread, fmt="k_", markersize=18, capsize=6, label="claimed"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(LATENT_F, [f"f = {f}" for f in LATENT_F])
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
