"""``ldm plan``: nodes, hours and cost, from measured rates and given prices."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig

__all__ = ["PlanJob"]


class PlanJob(JobConfig):
    """Print what PLAN comes to: nodes, hours, storage, memory, network and cost of encoding and training.

    PLAN is a YAML file; docs/sizing.md has one, the formulas, and what is assumed. Every figure is marked as
    measured, given, assumed or extrapolated. Nothing is started.
    """

    plan: CliPositionalArg[Path] = Field(description="YAML file with images, devices, rates and prices")
    rates: tuple[Path, ...] = Field(
        (), description="output of `ldm bench encode --json`, `ldm bench train --json`: rates of one device"
    )

    def run(self) -> dict[str, object]:
        """A column for each number of images: figures of stages and cost, what is missing, notes."""
        from jobs.plan_file import add_rates, read_plan
        from jobs.plan_view import as_json, print_plan
        from pipelines.planning.plan import make_plan

        config = read_plan(self.plan)
        for path in self.rates:
            config = add_rates(config, path)
        columns = make_plan(config)
        print_plan(config, columns)
        return as_json(config, columns)
