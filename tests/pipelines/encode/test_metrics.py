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
    # A reason of this test's own: other tests encode in the same cluster and count there too.
    metrics = EncodeMetrics()
    for _ in range(3):
        metrics.add(report().model_copy(update={"quarantined": {"only_here": 2}}))
    deadline = time.monotonic() + 60
    while not counted(text := scraped()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert counted(text) == [6.0]
    for name in ("rows_total", "images_total", "written_bytes_total", "units_total"):
        assert values(text, f"ldm_encode_{name}")[0] > 0
    assert values(text, "ldm_encode_unit_encode_seconds_count")[0] >= 3


def counted(text: str) -> list[float]:
    lines = [line for line in text.splitlines() if 'reason="only_here"' in line.replace("Reason", "reason")]
    return values("\n".join(lines), "ldm_encode_quarantined_total")
