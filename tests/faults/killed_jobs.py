"""Training jobs as processes with a cluster of their own, and SIGKILL for their parts."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from pipelines.train.metrics_log import METRICS_FILE

__all__ = [
    "finish",
    "kill_driver",
    "kill_everything",
    "kill_worker",
    "last_step",
    "start_job",
    "wait_for_step",
]

WORKER = "ray::RayTrainWorker"


def start_job(
    command: str, source: Path, out: Path, options: Mapping[str, object]
) -> "subprocess.Popen[str]":
    """``ldm COMMAND`` with a cluster of its own, in a process group of its own."""
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps({"train": options, "cluster": {"num_cpus": 4}}))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", command, str(source), str(out), "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    return output


def last_step(out: Path) -> int:
    file = out / METRICS_FILE
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def wait_for_step(out: Path, step: int, process: "subprocess.Popen[str]") -> int:
    deadline = time.monotonic() + 120
    while last_step(out) < step:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)
    return last_step(out)


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def kill_worker(process: "subprocess.Popen[str]") -> None:
    """One of the two ranks; the driver goes on."""
    victim = next(child for child in family(process) if WORKER in " ".join(child.cmdline()))
    victim.kill()


def kill_driver(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate(timeout=60)


def kill_everything(process: "subprocess.Popen[str]") -> None:
    """Driver, raylet, GCS and workers, at one moment."""
    root, stopped = psutil.Process(process.pid), set[psutil.Process]()
    # What is stopped starts nothing more: another look finds what was started during the one before.
    while starting := {root, *family(process)} - stopped:
        for member in starting:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
        stopped |= starting
    for member in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate(timeout=60)
