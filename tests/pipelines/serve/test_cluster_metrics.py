from prometheus_client.parser import text_string_to_metric_families

from pipelines.serve.cluster_metrics import _merged

NODE = """\
# HELP ray_ldm_serve_rows_total Rows of all U-Net calls
# TYPE ray_ldm_serve_rows_total counter
ray_ldm_serve_rows_total{{NodeAddress="{node}"}} {rows}
# HELP ray_object_store_memory Of Ray
# TYPE ray_object_store_memory gauge
ray_object_store_memory{{NodeAddress="{node}"}} 1.0
"""


def test_each_metric_is_described_once_with_the_samples_of_all_nodes() -> None:
    text = _merged([NODE.format(node=node, rows=rows) for node, rows in (("a", 1), ("b", 2))])
    (family,) = text_string_to_metric_families(text)
    assert {sample.labels["NodeAddress"]: sample.value for sample in family.samples} == {"a": 1, "b": 2}
    assert text.count("# TYPE") == text.count("# HELP") == 1


def test_nothing_of_nobody() -> None:
    assert _merged([]) == ""
