"""The page at the end of `ldm encode`, and its curve."""

from pathlib import Path

import pytest

from jobs.encode_page import MAX_BINS, Throughput, publish_page
from ldm.preprocess import Preprocess
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import DatasetHeader
from pipelines.encode.report import RunReport, UnitReport


def report(**values: object) -> UnitReport:
    made: dict[str, object] = {
        "unit": "s-1-000000",
        "shard": "s",
        "is_final": True,
        "inputs": 9,
        "rows": 8,
        "images": 16,
        "bytes": 800,
        "quarantined": {"not_an_image": 1},
        "examples": ("s.tar#<script>: not_an_image",),
        "decode_s": 0.5,
        "node": "host",
        "pid": 7,
        "device": "cpu",
        "encode_started_at": 1.0,
        "encode_s": 2.0,
    }
    return UnitReport.model_validate(made | values)


def test_no_image_is_lost_when_bins_are_merged() -> None:
    throughput = Throughput()
    for second in range(10 * MAX_BINS):
        throughput.add_at(second + 0.5, 3)
    starts, rates = throughput.rates()
    assert throughput.width_s == 16.0
    assert len(throughput.images) <= MAX_BINS
    assert sum(throughput.images) == 30 * MAX_BINS
    assert rates == [3.0] * len(starts)


def test_a_pause_is_a_rate_of_zero() -> None:
    throughput = Throughput()
    throughput.add_at(0.1, 5)
    throughput.add_at(3.9, 7)
    assert throughput.rates() == ([0, 1, 2, 3, 4], [5, 0, 0, 7, 7])


@pytest.mark.parametrize("is_bad", [True, False])
def test_page(tmp_path: Path, is_bad: bool) -> None:
    header = DatasetHeader(
        vae="f8", vae_fingerprint="0" * 64, f=8, channels=4, preprocess=Preprocess(), unit_size=8
    )
    dataset = LatentDataset.create_or_check(tmp_path, header)
    run, throughput = RunReport(), Throughput()
    mine = report() if is_bad else report(quarantined={}, examples=())
    run.add(mine)
    throughput.add(mine)
    summary = run.summary(seconds=4.0, units_skipped=3, retired_shards=[], removed_shards=["old"])
    page = (tmp_path / publish_page(dataset, summary, throughput, "in", "out")).read_text()
    assert "<h1>8 images encoded</h1>" in page
    assert "1 done, 3 were committed before" in page
    assert "2.0 s, 50 %" in page
    assert 'src="data:image/svg+xml;base64,' in page
    assert "http" not in page.replace("http://www.w3.org", "")
    # Names come from strangers.
    assert "<script>" not in page
    assert ("not_an_image" in page) == is_bad
