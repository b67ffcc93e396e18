"""The parts of ``ldm bench train`` that are quick, on sets that are small."""

import json
from pathlib import Path

from jobs.bench.latents import write_latents
from jobs.bench.processes import run_measured
from jobs.bench_train import BenchTrainJob
from pipelines.dataset import LatentDataset


def test_the_synthetic_latents_are_a_whole_dataset(tmp_path: Path) -> None:
    dataset = LatentDataset.open(write_latents(tmp_path / "d", 250, side=4, unit_size=100))
    assert dataset.manifest()["rows"].to_pylist() == [100, 100, 50]
    assert dataset.stored_summary()["rows"] == 250


def test_memory_and_a_bare_loop(tmp_path: Path) -> None:
    job = BenchTrainJob(only=("memory",), seconds=0.5, rows=(500, 2000))
    assert 0.5 < float(str(job.run()["loader_memory_growth"])) < 1.5
    latents = write_latents(tmp_path / "d", 200, side=8, unit_size=100)
    config = json.dumps({"preset": "tiny", "batch_size": 8, "data": {"validation_rows": 0}})
    measured = run_measured(["-m", "jobs.bench.train_ways", "bare", str(latents), "0.5", "1", config])
    assert json.loads(measured.output.splitlines()[-1])["images"] >= 8
