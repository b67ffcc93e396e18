"""TensorBoard and W&B hold what the metrics file holds, once, also after a stop in between."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb

from ldm.errors import UserError
from pipelines.train.config import UnetTraining
from pipelines.train.metrics_log import METRICS_FILE, MetricsLog
from pipelines.train.wandb_run import RUN_ID, WandbConfig, WandbRun, check_wandb
from tests.pipelines.train.event_files import shown
from tests.pipelines.train.test_state import Stopped, run
from tests.pipelines.train.wandb_files import history

ROOT = Path(__file__).parents[3]
SHORT = {"steps": 6, "validate_every": 3}
OFFLINE = {"project": "cats", "name": "first", "mode": "offline"}
STOP_AFTER = 5


@pytest.fixture(scope="module")
def folder(write_latents: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents") / "d", count=96)


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that was stopped and went on, with both monitors."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_ERROR_REPORTING", "false")
        with pytest.raises(Stopped):
            run(folder, out, stop_after=STOP_AFTER, wandb=OFFLINE, **SHORT)
        run(folder, out, wandb=OFFLINE, **SHORT)
    # The process that wandb keeps for the next run.
    wandb.teardown()
    return out


def metrics(out: Path) -> dict[tuple[int, str], float]:
    """(step, name) → value, of the metrics file."""
    lines = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if name not in ("step", "workers", "node", "pid", "device")
    }


def test_tensorboard_has_every_metric_once(out: Path) -> None:
    expected = metrics(out)
    assert {name for _, name in expected} == {
        "loss", "gradient_norm", "validation_loss", "learning_rate", "data_wait_share", "steps_per_s",
        "images_per_s", "elapsed_s", "left_s",
    }  # fmt: skip
    events = shown(out / "tensorboard")
    assert len(events) == len(expected)
    found = {(step, tag): value for step, tag, value in events}
    # Its scalars are of single precision.
    assert found == {key: float(np.float32(value)) for key, value in expected.items()}


def test_the_learning_rate_is_that_of_the_step(out: Path) -> None:
    """Warm-up of three steps to 3e-4, then half a cosine of step / steps down to a hundredth."""
    cosine = [0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * step / 6)) for step in range(6)]
    expected = [3e-4 * min(1, (step + 1) / 3) * cosine[step] for step in range(6)]
    assert [metrics(out)[step, "learning_rate"] for step in range(1, 7)] == pytest.approx(expected)


def test_wandb_has_every_metric_and_one_run(out: Path) -> None:
    expected = metrics(out)
    run_id = (out / RUN_ID).read_text()
    # In the order of their times, of which two may be the same to the second.
    files = sorted(out.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"), key=os.path.getmtime)
    assert len(files) == 2
    first, second = (
        {(row["_step"], name): value for row in history(path) for name, value in row.items()}
        for path in files
    )
    assert {step for step, _ in first} == set(range(1, STOP_AFTER + 1))
    # From the snapshot of step 4, or from an earlier one where that was not yet written.
    again = min(step for step, _ in second)
    assert again in (1, 3, 5) and {step for step, _ in second} == set(range(again, 7))
    found = {key: value for key, value in first.items() if key[0] < again} | second
    assert {key: found[key] for key in expected} == expected
    assert {name for _, name in found.keys() - expected.keys()} <= {"_step", "_runtime", "_timestamp"}


def test_without_wandb_nothing_of_it_is_written(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, steps=1)
    assert not list(tmp_path.glob("wandb*"))


def test_wandb_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"not installed .*; pip install 'ray-ldm\[wandb\]'$"):
        check_wandb(WandbConfig.model_validate(OFFLINE))


def test_wandb_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no key for Weights & Biases; run wandb login"):
        check_wandb(WandbConfig(project="cats"))


DYING = """
import sys, time, psutil, numpy, pathlib
from pipelines.train.wandb_run import WandbConfig, WandbRun
run = WandbRun(WandbConfig(project="cats", mode="offline"), pathlib.Path(sys.argv[1]), {})
run.log(1, {"loss": 1.0})
for process in psutil.Process().children(recursive=True):
    process.kill()
    process.wait()
# That the process is gone is noticed by one of the next writes.
for step in range(2, 100):
    run.log(step, {"loss": 1.0})
    run.show(step, numpy.zeros((2, 2, 3), numpy.uint8))
    time.sleep(0.02)
run.close()
print("trained")
"""


def test_the_training_outlives_wandbs_own_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(tmp_path)],
        # wandb notes its process there, for children to share.
        env={name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        | {"PYTHONPATH": str(ROOT), "WANDB_ERROR_REPORTING": "false"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told, last = done.stdout.splitlines()[-2:]
    assert told.startswith("Weights & Biases is left out from here on: ")
    assert done.stdout.count("left out") == 1
    assert last == "trained"


def test_a_server_that_refuses_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**options: object) -> None:
        raise wandb.errors.CommError("permission denied")

    monkeypatch.setattr(wandb, "init", refuse)
    refused = WandbRun(WandbConfig(project="cats"), tmp_path, {})
    refused.log(1, {"loss": 1.0})
    refused.close()
    assert capsys.readouterr().out == "Weights & Biases is left out from here on: permission denied\n"


def test_a_pause_counts_in_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("pipelines.train.metrics_log.perf_counter", lambda: now)
    log = MetricsLog("train", UnetTraining(batch_size=8, steps=2), tmp_path / METRICS_FILE, 0, 0, [])
    for step in (1, 2):
        log.add({"loss": torch.zeros(())}, torch.zeros(()))
        now += 10
        line = log.close(step, waited_s=2)
        with log.pause():  # a validation
            now += 7
        log.write(line, learning_rate=0.1)
        assert line["data_wait_share"] == pytest.approx(0.2)
        assert line["images_per_s"] == pytest.approx(0.8)
        with log.pause():  # a grid
            now += 5
    assert line["elapsed_s"] == pytest.approx(39)
