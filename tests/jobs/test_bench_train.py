"""The parts of ``ldm bench train`` that are quick, on sets that are small."""

import json
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from jobs.bench import turns
from jobs.bench.latents import write_latents
from jobs.bench.processes import run_measured
from jobs.bench.turns import Way, rate_of, take_turns
from jobs.bench_train import BenchTrainJob
from pipelines.dataset import LatentDataset


def test_the_synthetic_latents_are_a_whole_dataset(tmp_path: Path) -> None:
    dataset = LatentDataset.open(write_latents(tmp_path / "d", 250, side=4, unit_size=100))
    assert dataset.manifest()["rows"].to_pylist() == [100, 100, 50]
    assert dataset.stored_summary()["rows"] == 250


@pytest.mark.faults_long
def test_memory_of_two_sets() -> None:
    job = BenchTrainJob(only=("memory",), seconds=0.5, rows=(500, 2000))
    assert 0.5 < float(str(job.run()["loader_memory_growth"])) < 1.5


@pytest.mark.faults_long
@pytest.mark.parametrize("way", ["bare", "cached"])
def test_a_way_logs_its_rate(tmp_path: Path, way: str) -> None:
    latents = write_latents(tmp_path / "d", 200, side=8, unit_size=100)
    config = json.dumps({"preset": "tiny", "batch_size": 8, "data": {"validation_rows": 0}})
    log = tmp_path / "log.jsonl"
    run_measured(["-m", "jobs.bench.train_ways", way, str(latents), str(log), "1", config, "0.5"])
    assert json.loads(log.read_text().splitlines()[0])["steps_per_s"] > 0


TICKER = """
import json, subprocess, sys, time
log = open(sys.argv[1], "a", buffering=1)
child = subprocess.Popen(["sleep", "600"])
while True:
    begin = time.monotonic()
    while time.monotonic() < begin + float(sys.argv[2]):
        pass
    end = time.monotonic()
    line = {"steps_per_s": 1 / (end - begin), "begin": begin, "end": end, "child": child.pid}
    log.write(json.dumps(line) + chr(10))
"""


def test_turns_do_not_overlap_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TURN_S", 1.0)
    ways = {
        name: Way(("-c", TICKER, str(tmp_path / name), str(seconds)), tmp_path / name)
        for name, seconds in (("slow", 0.1), ("fast", 0.05))
    }
    lines = take_turns(ways, seconds=3)
    spans = sorted((line["begin"], line["end"]) for found in lines.values() for line in found)
    overlap_s = sum(max(0.0, a[1] - b[0]) for a, b in pairwise(spans))
    assert len(lines["fast"]) > len(lines["slow"]) > 3
    assert overlap_s < 0.05 * sum(end - begin for begin, end in spans)
    assert rate_of(lines["slow"]) == pytest.approx(10, rel=0.2)
    assert not any(_runs(int(found[0]["child"])) for found in lines.values())


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_command_that_ends_is_said_with_its_error(tmp_path: Path) -> None:
    way = Way(("-c", "raise SystemExit('out of luck')"), tmp_path / "log.jsonl")
    with pytest.raises(RuntimeError, match="ended by itself:\nout of luck"):
        take_turns({"one": way}, seconds=1)
