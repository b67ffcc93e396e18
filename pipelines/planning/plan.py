"""The whole plan: a column for each number of images."""

from dataclasses import dataclass

from pipelines.planning.config import PlanConfig
from pipelines.planning.cost import cost_of
from pipelines.planning.encode import encode_figures
from pipelines.planning.figures import Figure
from pipelines.planning.stage import Figures
from pipelines.planning.train import train_figures

__all__ = ["Column", "make_plan"]

# Resuming was measured with as many (docs/benchmarks.md, resume_100k_s).
UNITS_MEASURED = 100_000


@dataclass(frozen=True)
class Column:
    """The plan for so many images: figures of each stage and of the cost, by name.

    missing: what there is no total cost without. notes: what else a reader should know.
    """

    images: int
    stages: dict[str, Figures]
    cost: Figures
    missing: list[str]
    notes: list[str]


def make_plan(config: PlanConfig) -> list[Column]:
    """A column for each of ``config.images``. UserError where the plan cannot be carried out."""
    train = None if config.train is None else train_figures(config.train, config.dataset)
    return [_column(config, images, train) for images in config.images]


def _column(config: PlanConfig, images: int, train: Figures | None) -> Column:
    stages: dict[str, Figures] = {}
    if config.encode is not None:
        stages["encode"] = encode_figures(config.encode, config.dataset, images)
    if train is not None:
        seen = train["images trained on"].value
        stages["train"] = {**train, "epochs": Figure(seen / images, "", "given")}
    cost = cost_of(config, images, stages)
    return Column(images, stages, cost.figures, cost.missing, _notes(stages))


def _notes(stages: dict[str, Figures]) -> list[str]:
    units = stages["encode"]["units"].value if "encode" in stages else 0
    if units <= UNITS_MEASURED:
        return []
    return [
        f"{units:,.0f} units: going on after an interruption was measured with {UNITS_MEASURED:,}; "
        "a larger dataset.unit_size makes fewer"
    ]
