"""The metrics of all stages are where Prometheus finds them, under the names that the dashboards ask for."""

import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipelines.encode.metrics import EncodeMetrics
from pipelines.serve.stage_metrics import RequestMetrics, SamplerMetrics, StageMetrics
from pipelines.train.ray_metrics import RayMetrics
from tests.cluster.metric_names import metrics_in_code
from tests.pipelines.encode.test_progress import report

DEADLINE_S = 60.0
# Written by the server itself, on its own page.
NOT_THROUGH_RAY = {"ldm_serve_nodes_without_metrics"}


def scraped() -> dict[str, list[tuple[dict[str, str], float]]]:
    """What the node's exporter serves: name → labels and values."""
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def use_all() -> None:
    """Give every metric a value. A reason and a run of this test's own: others count in the same cluster."""
    encode = EncodeMetrics()
    for _ in range(3):
        encode.add(report().model_copy(update={"quarantined": {"only_here": 2}}))
    train = RayMetrics("only_here")
    names = (
        "loss", "validation_loss", "gradient_norm", "learning_rate", "steps_per_s", "images_per_s",
        "data_wait_share", "left_s", "elapsed_s", "kl",
    )  # fmt: skip
    train.log(7, {name: number + 0.5 for number, name in enumerate(names)})
    sampler = SamplerMetrics()
    sampler.stepped(seconds=0.1, rows=2, room=4)
    sampler.started(waited_s=0.1)
    sampler.previewed(seconds=0.1)
    sampler.refused("full")
    sampler.cancelled(steps=1)
    sampler.left(3.0)
    StageMetrics("decoder").done(0.1)
    requests = RequestMetrics()
    requests.retried("sampler")
    requests.held_off()


@pytest.mark.usefixtures("ray_cluster")
def test_all_reach_the_exporter_as_the_dashboards_name_them() -> None:
    use_all()
    expected = {series for metric in metrics_in_code().values() for series in metric.series} - NOT_THROUGH_RAY
    deadline = time.monotonic() + DEADLINE_S
    while not expected <= (found := scraped()).keys() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert expected - found.keys() == set()

    def here(name: str, label: str) -> list[float]:
        return [value for labels, value in found[name] if labels.get(label) == "only_here"]

    assert here("ray_ldm_encode_quarantined_total", "reason") == [6.0]
    assert here("ray_ldm_train_step", "run") == [7.0]
    assert here("ray_ldm_train_loss", "run") == [0.5]
    (term,) = [labels for labels, _ in found["ray_ldm_train_loss_term"] if labels["run"] == "only_here"]
    assert term["term"] == "kl"
    assert all("SessionName" in labels for labels, _ in found["ray_ldm_train_step"])
