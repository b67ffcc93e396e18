"""The metrics of a run are where Prometheus finds them."""

import time
import urllib.request

import pytest

from pipelines.encode.metrics import EncodeMetrics
from tests.pipelines.encode.test_progress import report

pytestmark = pytest.mark.usefixtures("ray_cluster")


def scraped() -> str:
    """What the node's exporter serves."""
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        return str(reply.read().decode())


def values(text: str, name: str) -> list[float]:
    return [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"ray_{name}")]


def test_counts_reach_the_exporter() -> None:
    metrics = EncodeMetrics()
    for _ in range(3):
        metrics.add(report())
    deadline = time.monotonic() + 60
    while not values(text := scraped(), "ldm_encode_rows_total") and time.monotonic() < deadline:
        time.sleep(0.5)
    assert values(text, "ldm_encode_rows_total") == [30.0]
    assert values(text, "ldm_encode_images_total") == [60.0]
    assert values(text, "ldm_encode_quarantined_total{") == [3.0]
    assert values(text, "ldm_encode_unit_encode_seconds_count") == [3.0]
