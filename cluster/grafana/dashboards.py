"""The dashboards, made of tables of panels: ``python cluster/grafana/dashboards.py`` writes the JSON files.

Grafana's JSON is long and says everything many times; in the tables a panel is a few lines, and its place and
number follow from the order. A test compares the files with this, and the queries with the code's metrics.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from encode import ENCODE
from panels import ONLY, Panel, Row
from serve import SERVE
from train import TRAIN

GRID_WIDTH, PANEL_HEIGHT, ROW_HEIGHT = 24, 8, 1
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# file → title, rows, a metric by whose labels sessions (and runs) are chosen
DASHBOARDS = {
    "encode": ("ray-ldm: encode", ENCODE, "ray_ldm_encode_units_total"),
    "train": ("ray-ldm: train", TRAIN, "ray_ldm_train_step"),
    "serve": ("ray-ldm: serve", SERVE, "ray_ldm_serve_sampler_seconds_left"),
}


def dashboard(name: str) -> dict[str, Any]:
    """As Grafana imports it; it asks for the data source then."""
    title, rows, metric = DASHBOARDS[name]
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus"},
        _variable("session", f"label_values({metric}, SessionName)"),
    ]
    if name == "train":
        variables.append(_variable("run", f"label_values({metric}{{{ONLY}}}, run)"))
    return {
        "uid": f"ray-ldm-{name}",
        "title": title,
        "tags": ["ray-ldm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": list(_placed(rows)),
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _placed(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    number, y = 0, 0
    for row in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": y, "w": GRID_WIDTH, "h": ROW_HEIGHT},
            "panels": [],
        }
        y += ROW_HEIGHT
        x = 0
        for panel in row.panels:
            number += 1
            yield _graph(panel, number, x, y)
            x += panel.width
        y += PANEL_HEIGHT


def _graph(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.said,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": PANEL_HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


def text(name: str) -> str:
    """What the file of a dashboard holds."""
    return json.dumps(dashboard(name), indent=1) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for each in DASHBOARDS:
        (folder / f"{each}.json").write_text(text(each), encoding="utf-8")
