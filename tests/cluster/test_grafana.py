"""The dashboards: what is asked for exists, what exists is shown, and Grafana can place it."""

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import ray

from tests.cluster.manifests import ROOT
from tests.cluster.metric_names import metrics_in_code

FOLDER = ROOT / "cluster/grafana"
NAMES = ("encode", "train", "serve")
METRIC = re.compile(r"\b(?:ray_|ldm_)[a-z0-9_]+")
# Ray's own metrics → the module of Ray that makes them.
OF_RAY = {
    "node_cpu_utilization": "dashboard/modules/reporter/reporter_agent.py",
    "node_gpus_utilization": "dashboard/modules/reporter/reporter_agent.py",
    "node_mem_used": "dashboard/modules/reporter/reporter_agent.py",
    "node_gram_used": "dashboard/modules/reporter/reporter_agent.py",
    "serve_deployment_request_counter": "serve/_private/replica.py",
    "serve_deployment_error_counter": "serve/_private/replica.py",
    "serve_deployment_replica_healthy": "serve/_private/deployment_state.py",
    "serve_deployment_queued_queries": "serve/_private/router.py",
    "train_controller_state": "train/v2/_internal/metrics/controller.py",
}


def dashboard(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{name}.json").read_text()))


def panels(name: str) -> list[dict[str, Any]]:
    return list(dashboard(name)["panels"])


def queries(name: str) -> list[str]:
    """Of panels and variables, with values in place of what Grafana puts in."""
    found = [target["expr"] for panel in panels(name) for target in panel.get("targets", [])]
    for variable in dashboard(name)["templating"]["list"]:
        if variable["type"] == "query":
            found.append(re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"])[1])
    return [re.sub(r"\$\w+", "5m", query) for query in found]


def metrics_shown() -> set[str]:
    return {metric for name in NAMES for query in queries(name) for metric in _metrics(query)}


def _metrics(query: str) -> set[str]:
    """Names of series: what is a label (after ``by``, in braces) is none."""
    without_labels = re.sub(r"\{[^}]*\}|by \([^)]*\)", "", query)
    return set(METRIC.findall(without_labels))


def test_files_are_what_the_tables_make(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "dashboards.py", tmp_path], check=True, timeout=60)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {f"{name}.json": (FOLDER / f"{name}.json").read_text() for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_queries_are_promql(name: str) -> None:
    for query in queries(name):
        promql_parser.parse(query)


def test_what_is_no_promql_is_found() -> None:
    with pytest.raises(ValueError, match=r"."):
        promql_parser.parse("sum (rate(ray_ldm_serve_rows_total[5m])")


def test_every_metric_that_is_asked_for_exists() -> None:
    own = {series for metric in metrics_in_code().values() for series in metric.series}
    for metric in metrics_shown() - own:
        name = metric.removeprefix("ray_").removesuffix("_total")
        assert name in OF_RAY, metric
        assert f'"{name}"' in (Path(ray.__file__).parent / OF_RAY[name]).read_text(), metric


def test_every_metric_of_the_code_is_shown() -> None:
    shown = metrics_shown()
    assert [metric.name for metric in metrics_in_code().values() if not metric.series & shown] == []


@pytest.mark.parametrize("name", NAMES)
def test_panels_have_ids_of_their_own_and_places_of_their_own(name: str) -> None:
    found = panels(name)
    assert len({panel["id"] for panel in found}) == len(found)
    places = [panel["gridPos"] for panel in found]
    assert all(at["x"] >= 0 and at["x"] + at["w"] <= 24 and at["h"] > 0 for at in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


@pytest.mark.parametrize("name", NAMES)
def test_every_graph_has_a_query_a_unit_and_the_chosen_source(name: str) -> None:
    for panel in panels(name):
        if panel["type"] == "row":
            continue
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert references == sorted(set(references)) != []


def test_labels_that_a_query_groups_by_are_those_of_its_metric() -> None:
    metrics = {series: metric for metric in metrics_in_code().values() for series in metric.series}
    for query in (query for name in NAMES for query in queries(name)):
        own = [metrics[series] for series in _metrics(query) if series in metrics]
        for labels in re.findall(r"by \(([^)]*)\)", query) if own else []:
            assert set(labels.split(", ")) - {"le"} <= {label for metric in own for label in metric.labels}


def test_the_page_lists_every_metric_with_its_kind_and_labels() -> None:
    page = (ROOT / "docs/observability.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|[^|]*\|([^|]*)\|", page, flags=re.MULTILINE)
    told = {name: (kind.capitalize(), tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert told == {metric.name: (metric.kind, metric.labels) for metric in metrics_in_code().values()}
