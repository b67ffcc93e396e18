"""``ldm train-vae`` on an output that is there already: what it refuses, and a run that is finished."""

from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs import cli
from jobs.train_vae import TrainVaeJob
from ldm.autoencoder import load
from ldm.latents import LatentStats
from pipelines.shards import Sample, write_tar
from pipelines.train.run_record import write_record
from pipelines.train.vae import record_of, train
from pipelines.train.vae_config import VaeTraining
from pipelines.train.vae_state import VaeState

STEPS, CROP_PX = 2, 16


@pytest.fixture
def shards(tmp_path: Path, photo: Callable[[int], bytes]) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "a.tar", [Sample("k", photo(0))])
    return folder


@pytest.fixture
def config(vae_folder: Path) -> VaeTraining:
    return VaeTraining(init=str(vae_folder), steps=STEPS, batch_size=2, crop_px=CROP_PX)


@pytest.fixture
def begun(shards: Path, config: VaeTraining, tmp_path: Path) -> Path:
    """The output of a run that was stopped before its first snapshot."""
    out = tmp_path / "out"
    out.mkdir()
    write_record(out, record_of(str(shards), config))
    return out


def batches_after(step: int) -> Iterator[Tensor]:
    return repeat(torch.rand(2, 3, CROP_PX, CROP_PX, generator=torch.Generator().manual_seed(0)) * 2 - 1)


@pytest.fixture
def trained(begun: Path, config: VaeTraining) -> Path:
    """The output of a run that was stopped after its last snapshot."""
    with torch.random.fork_rng():
        train(VaeState(config, torch.device("cpu"), lambda module: module), batches_after, begun)
    return begun


def refusal(capsys: pytest.CaptureFixture[str], shards: Path, out: Path, vae: Path, *args: str) -> str:
    given = f"--train.init {vae} --train.steps {STEPS} --train.batch-size 2 --train.crop-px {CROP_PX}".split()
    assert cli.main(["train-vae", str(shards), str(out), *given, *args]) == 2
    out_text, err = capsys.readouterr()
    assert out_text == ""
    assert err.count("\n") == 1
    return err


def test_another_config_is_shown(
    shards: Path, begun: Path, vae_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is allowed or free is not."""
    args = ["--train.kl-weight", "0.1", "--train.seed", "5", "--train.threads", "2", "--allow", "kl_weight"]
    said = refusal(capsys, shards, begun, vae_folder, *args)
    assert "(train.seed: 5, was 0); give the settings of that run" in said
    assert "--allow train.seed" in said


def test_another_input_and_another_vae_under_the_same_name_are_shown(
    shards: Path,
    begun: Path,
    vae_folder: Path,
    other_vae_folder: Path,
    photo: Callable[[int], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tar(shards / "b.tar", [Sample("k2", photo(2))])
    said = refusal(capsys, shards, begun, other_vae_folder)
    assert all(f"{name}: " in said for name in ("input.shards", "init.fingerprint"))


def test_an_output_that_cannot_be_written(
    shards: Path, vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write to " in refusal(capsys, shards, tmp_path / "file" / "out", vae_folder)


def test_snapshots_of_which_none_is_valid(
    shards: Path, trained: Path, vae_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = trained.glob("snapshots/*2/*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    for other in trained.glob("snapshots/*1/*.distcp"):
        other.unlink()
    said = refusal(capsys, shards, trained, vae_folder)
    assert "no snapshot in " in said and "(step 2: " in said


def test_after_the_last_step_only_the_export_is_left_and_then_nothing(
    shards: Path, trained: Path, config: VaeTraining, vae_folder: Path
) -> None:
    """Without a cluster; the weights are those of the snapshot's average, the scale that of its latents."""
    result = TrainVaeJob(input=str(shards), out=trained, train=config).run()
    made = load(trained)
    assert (result["step"], result["f"], result["fingerprint"]) == (STEPS, 4, made.fingerprint)
    assert made.fingerprint != load(vae_folder).fingerprint
    scale = LatentStats.of(made.encode(next(batches_after(0)))).scaling_factor
    assert made.vae.config["scaling_factor"] == pytest.approx(scale, rel=1e-4)
    written = {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")}
    assert TrainVaeJob(input=str(shards), out=trained, train=config).run() == result
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")} == written
    assert not list(trained.glob(".vae*"))


def test_an_export_that_was_cut_is_made_again(shards: Path, trained: Path, config: VaeTraining) -> None:
    job = TrainVaeJob(input=str(shards), out=trained, train=config)
    result = job.run()
    (trained / "metrics.json").unlink()
    (weights,) = trained.glob("*.safetensors")
    weights.unlink()
    (trained / ".vae.partial").mkdir()
    (trained / ".vae.partial/config.json").write_text("{")
    assert job.run() == result
