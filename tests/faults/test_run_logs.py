"""``LDM_LOG_FORMAT=json`` on a cluster of its own: lines of the driver and of its workers name their run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.run_record import read_records

pytestmark = pytest.mark.faults_long

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import logging, sys
from pathlib import Path
import ray
from jobs.cluster import ClusterConfig, connected
from jobs.current_run import recorded
from jobs.sample import SampleJob

@ray.remote
def work():
    logging.getLogger("mine").warning("from a worker")

with recorded("sample", [], SampleJob(checkpoint="none", out=Path(sys.argv[1]))):
    with connected(ClusterConfig(num_cpus=1, worker_logs=True)):
        ray.get(work.remote())
        import time; time.sleep(2)  # until the worker's line has come
"""


def test_lines_of_driver_and_workers_name_their_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = os.environ | {"LDM_LOG_FORMAT": "json", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, out],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    (record,) = read_records(str(out))
    said = {line["message"]: line for line in lines}
    worker = said["from a worker"]
    assert (worker["run_id"], worker["stage"], worker["name"]) == (record.run, "sample", "mine")
    assert worker["levelname"] == "WARNING" and worker["task_name"] == "work" and worker["asctime"]
    driver = said["sample begins on 1 nodes"]
    assert (driver["run_id"], driver["stage"], driver["name"]) == (record.run, "sample", "ldm.run")
    assert any(message.startswith("sample is done after ") for message in said)
