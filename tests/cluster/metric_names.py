"""The metrics that the code exports, read from its syntax, under the names that Prometheus has them by."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.cluster.manifests import ROOT

__all__ = ["Metric", "metrics_in_code"]

KINDS = ("Counter", "Gauge", "Histogram")
OWN = re.compile(r"ldm_(encode|train|serve)_[a-z_]+")


@dataclass(frozen=True)
class Metric:
    """name: as Prometheus has it, of a histogram without _bucket, _sum and _count."""

    name: str
    kind: str
    labels: tuple[str, ...] = ()

    @property
    def series(self) -> set[str]:
        """Names that a query may have."""
        if self.kind == "Histogram":
            return {f"{self.name}_{part}" for part in ("bucket", "sum", "count")}
        return {self.name}


def metrics_in_code() -> dict[str, Metric]:
    """By name."""
    found = {}
    for path in sorted((ROOT / "pipelines").rglob("*.py")):
        tree = ast.parse(path.read_text())
        through_ray = {id(call.args[0]): _metric(call) for call in _calls(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and OWN.fullmatch(str(node.value)):
                # One that is named otherwise is written out by ourselves.
                metric = through_ray.get(id(node)) or Metric(str(node.value), "Gauge")
                found[metric.name] = metric
    return found


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS
        if is_call and node.args and isinstance(node.args[0], ast.Constant):
            yield node


def _metric(call: ast.Call) -> Metric:
    kind, name = call.func.id, call.args[0].value
    labels = [keyword.value for keyword in call.keywords if keyword.arg == "tag_keys"]
    if kind != "Histogram" and len(call.args) > 2:
        labels = [call.args[2]]
    total = "_total" if kind == "Counter" and not name.endswith("_total") else ""
    return Metric(f"ray_{name}{total}", kind, ast.literal_eval(labels[0]) if labels else ())
