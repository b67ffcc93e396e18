"""SIGKILL of a generation with all its actors: again, what is missing is made, to the same bytes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.killed_jobs import finish, kill_everything

pytestmark = [pytest.mark.faults_long, pytest.mark.timeout(600)]

OPTIONS = "--num-images 400 --images-per-shard 20 --steps 20 --pools.sampler.threads 1 --cluster.num-cpus 4"


def start(checkpoint: Path, out: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "generate", str(checkpoint), str(out), *OPTIONS.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_killed_and_started_again(checkpoint_folders: dict[str, Path], tmp_path: Path) -> None:
    folder, out, whole = checkpoint_folders["v_prediction"], tmp_path / "out", tmp_path / "whole"
    process = start(folder, out)
    deadline_s = time.monotonic() + 200
    while len([*out.glob("*.tar")]) < 3:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline_s, "no progress"
        time.sleep(0.02)
    kill_everything(process)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 3 <= len(before) < 20
    assert f"{400 - 20 * len(before)} of them made now" in finish(start(folder, out))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    finish(start(folder, whole))
    made = {path.name: path.read_bytes() for path in whole.glob("*.tar")}
    assert len(made) == 20
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == made
