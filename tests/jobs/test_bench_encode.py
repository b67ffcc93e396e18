"""`ldm bench encode` at sizes that tell nothing about speed: that it runs, and what it returns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench.encode_ways import Clock
from jobs.bench.photos import write_shards
from jobs.bench.processes import run_measured
from jobs.bench_encode import BenchEncodeJob
from pipelines.shards import list_shards, read_samples


def test_storage_and_resume() -> None:
    result = BenchEncodeJob(only=("storage", "resume"), storage_images=3, resume_units=(250, 500)).run()
    assert result.keys() == {
        "bytes_fp16",
        "bytes_int8",
        "int8_loss_db",
        "resume_few_s",
        "resume_100k_s",
        "resume_100k_mb",
    }
    assert 0.3 < float(str(result["bytes_int8"])) / float(str(result["bytes_fp16"])) < 0.8
    # A process that imported torch takes more.
    assert 50 < float(str(result["resume_100k_mb"])) < 500


def test_photo_shards_are_the_same_every_time(tmp_path: Path) -> None:
    first, second = (write_shards(tmp_path / name, 5, 32, 2) for name in "ab")
    assert [shard.name for shard in list_shards(first)] == [f"shard-{i:05d}" for i in range(3)]
    pairs = zip(list_shards(first), list_shards(second), strict=True)
    assert all(list(read_samples(a)) == list(read_samples(b)) for a, b in pairs)


@pytest.mark.faults_long
@pytest.mark.parametrize("way", ["bare", "file-per-image"])
def test_a_way_counts_what_it_encodes(way: str, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 4, 32, 4)
    arguments = [way, str(shards), str(tmp_path / "out"), "0.1", "1"]
    command = [sys.executable, "-m", "jobs.bench.encode_ways", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["images"] >= 16 and measured["seconds"] >= 0.1


def test_the_clock_leaves_the_first_batch_out() -> None:
    clock = Clock(0.0)
    for _ in range(3):
        clock.batch(10)
    assert clock.is_over and clock.result()["images"] == 20


def test_memory_of_children_counts() -> None:
    child = "import time; x = bytearray(100_000_000); x[::4096] = b'x' * len(x[::4096]); time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_measured(["-c", parent], with_memory=True).peak_mb > 100
    with pytest.raises(RuntimeError, match="boom"):
        run_measured(["-c", "raise SystemExit('boom')"])
