"""Reading what `ldm plan` is given: the plan as YAML, and the JSON lines of benchmarks."""

import json
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from jobs.option_errors import explained
from jobs.option_sources import OptionPlace, read_mapping
from ldm.errors import UserError
from pipelines.planning.bench_rates import with_bench
from pipelines.planning.config import PlanConfig

__all__ = ["add_rates", "read_plan"]

MAX_RATES_BYTES = 10_000_000


def read_plan(path: Path) -> PlanConfig:
    """UserError, in one line, for a file that is not there, no YAML, or no plan."""
    if not path.is_file():
        raise UserError(f"no such plan: {path}", do="give a YAML file; docs/sizing.md has one")
    values = read_mapping(path, str(path))
    try:
        return PlanConfig.model_validate(values)
    except ValidationError as error:
        raise explained(error, PlanConfig, [OptionPlace(values, ".".join, path)]) from error


def add_rates(config: PlanConfig, path: Path) -> PlanConfig:
    """The plan with the rates of a file whose last line is what a benchmark's ``--json`` printed.

    They count as measured on the day that the file was written (UTC).
    """
    try:
        if path.stat().st_size > MAX_RATES_BYTES:
            raise UserError(
                f"{path} is larger than {MAX_RATES_BYTES:,} bytes", do="give a benchmark's output"
            )
        lines = path.read_text(encoding="utf-8").split("\n")
        found = json.loads(next((line for line in reversed(lines) if line.strip()), ""))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its last line is not JSON"
        raise UserError(
            f"cannot read --rates {path}: {reason}", do="run the benchmark with --json"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"cannot read --rates {path}: no JSON object", do="run the benchmark with --json")
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC).date()
    return with_bench(config, found, written, str(path))
