"""A plan as tables for a terminal, and as JSON."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipelines.planning.config import PlanConfig
from pipelines.planning.figures import Figure
from pipelines.planning.plan import Column
from pipelines.planning.stage import Figures

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["as_json", "print_plan", "text_of"]

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# Wider than the 80 columns that rich takes where there is no terminal: a plan is often sent into a file.
FILE_WIDTH = 140


def print_plan(config: PlanConfig, columns: Sequence[Column]) -> None:
    """A table for each stage and one for the cost, then what a reader should know."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    currency = _currency(config)
    for name in columns[0].stages:
        stage = config.encode if name == "encode" else config.train
        assert stage is not None
        title = f"{name}: {stage.device}"
        console.print(_table(title, columns, [column.stages[name] for column in columns], currency))
    if any(column.cost for column in columns):
        console.print(_table("cost", columns, [column.cost for column in columns], currency))
    for line in dict.fromkeys(_lines(columns)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def as_json(config: PlanConfig, columns: Sequence[Column]) -> dict[str, object]:
    """Plain values."""
    return {
        "currency": _currency(config),
        "plans": [
            {
                "images": column.images,
                **{name: _plain(figures) for name, figures in column.stages.items()},
                "cost": _plain(column.cost),
                "missing_for_a_total": column.missing,
                "notes": column.notes,
            }
            for column in columns
        ],
        "plan": config.model_dump(mode="json"),
    }


def text_of(figure: Figure, currency: str = "") -> str:
    """Four digits of the value with its unit; whole numbers in full, bytes with a decimal prefix."""
    value, unit = figure.value, figure.unit
    if unit == "share":
        return f"{value:.2%}"
    if unit in ("B", "B/s"):
        size, prefix = next(((size, prefix) for size, prefix in PREFIXES if value >= size), (1, ""))
        return f"{value / size:.4g} {prefix}{unit}"
    if unit == "currency":
        return f"{value:,.2f} {currency}".rstrip()
    shown = f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.4g}"
    return f"{shown} {unit}".rstrip()


def _table(title: str, columns: Sequence[Column], figures: Sequence[Figures], currency: str) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table("", title=escape(title), title_justify="left")
    for column in columns:
        table.add_column(f"{column.images:,} images", justify="right")
    table.add_column("is")
    table.add_column("how")
    for name in figures[0]:
        row = [found[name] for found in figures]
        origins = " or ".join(dict.fromkeys(figure.origin for figure in row))
        notes = "; ".join(dict.fromkeys(figure.note for figure in row if figure.note))
        table.add_row(name, *(text_of(figure, currency) for figure in row), origins, escape(notes))
    return table


def _lines(columns: Sequence[Column]) -> Iterable[str]:
    for column in columns:
        if column.missing:
            yield f"no total cost: {', '.join(column.missing)} missing"
        for note in column.notes:
            yield f"{column.images:,} images: {note}"


def _plain(figures: Figures) -> dict[str, object]:
    return {name: asdict(figure) for name, figure in figures.items()}


def _currency(config: PlanConfig) -> str:
    return config.prices.currency if config.prices else ""
