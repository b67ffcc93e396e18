"""Two whole jobs started at once on one output: one writes, the other stops and says so."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.dataset import LatentDataset
from pipelines.shards import Sample, write_tar
from pipelines.verify import verify

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 16
TRIES = 8
# What the loser may say: the other one holds the lease, or its dataset is not the one asked for.
REASONS = ("is being written by process", "holds latents of another kind", "too many runs want to write")


def start(source: Path, out: Path, vae: Path, unit_size: int) -> subprocess.Popen[str]:
    import ray

    address = str(ray.get_runtime_context().gcs_address)
    command = [sys.executable, "-m", "jobs.cli", "encode", str(source), str(out), "--vae", str(vae)]
    options = ["--unit-size", str(unit_size), "--preprocess.sizes-px", "[32]", "--cluster.address", address]
    pools = ["--encoder.num-cpus", "0.5", "--decode.num-cpus", "0.5"]
    return subprocess.Popen(
        [*command, *options, *pools],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# Each try is two commands from start to end; tests/pipelines/test_lease.py races for the lease alone.
@pytest.mark.faults_long
@pytest.mark.timeout(600)
def test_never_a_mixed_dataset(
    tmp_path: Path, photo: Callable[[int], bytes], vae_folder: Path, ray_cluster: None
) -> None:
    write_tar(tmp_path / "in.tar", [Sample(f"k{i}", photo(i)) for i in range(SAMPLES)])
    for attempt in range(TRIES):
        out = tmp_path / f"out{attempt}"
        # Every other time the two jobs do not even want the same dataset.
        sizes = (4, 4 + attempt % 2 * 4)
        with contextlib.ExitStack() as ending:
            jobs = [start(tmp_path / "in.tar", out, vae_folder, size) for size in sizes]
            for process in jobs:
                ending.callback(process.kill)
            said = [process.communicate(timeout=120) for process in jobs]
        codes = sorted(process.returncode for process in jobs)
        assert codes in ([0, 0], [0, 2]), said
        assert sizes[0] == sizes[1] or codes == [0, 2]
        for process, (_, err) in zip(jobs, said, strict=True):
            if process.returncode:
                (line,) = [line for line in err.splitlines() if line.startswith("ldm encode: error: ")]
                assert any(reason in line for reason in REASONS), line
                print(f"try {attempt}: {line}")
        dataset = LatentDataset.open(out)
        size = dataset.header.unit_size
        assert size in sizes
        commits = list(dataset.commits())
        assert [commit.num_inputs for commit in commits] == [size] * (SAMPLES // size)
        assert not verify(dataset).findings.counts
