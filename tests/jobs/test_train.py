"""What ``ldm train`` refuses, in one line and before any step."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jobs import cli
from jobs.config import load
from jobs.train import TrainJob
from ldm import unet
from pipelines.dataset import LatentDataset
from pipelines.train.config import UnetTraining
from pipelines.train.plan import plan
from pipelines.train.run_record import record_of, write_record

SMALL = ["--train.preset", "tiny", "--train.batch-size", "8", "--train.data.validation-rows", "0"]


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(["train", *args, *SMALL]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.fixture
def begun(latent_folder: Path, tmp_path: Path) -> Path:
    """The output of a run that was stopped before its first snapshot."""
    config = UnetTraining.model_validate({"preset": "tiny", "batch_size": 8, "data": {"validation_rows": 0}})
    dataset = LatentDataset.open(latent_folder)
    write_record(tmp_path / "out", record_of(dataset, config, plan(dataset, config, None)))
    return tmp_path / "out"


def test_another_config_is_shown(
    latent_folder: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(
        capsys, str(latent_folder), str(begun), "--train.learning-rate", "0.1", "--train.seed", "5"
    )
    assert "train.learning_rate: 0.1, was 0.0003; train.seed: 5, was 0" in said
    assert "--allow train.learning_rate,train.seed" in said


def test_what_is_allowed_or_free_may_differ(
    latent_folder: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next difference is refused, so the allowed one was not."""
    args = ("--allow", "learning_rate", "--train.learning-rate", "0.1", "--train.threads", "2")
    watched = ("--train.samples.every", "5", "--train.wandb.project", "cats", "--train.wandb.mode", "offline")
    said = refusal(capsys, str(latent_folder), str(begun), *args, *watched, "--train.seed", "5")
    assert "(train.seed: 5, was 0)" in said


def test_another_dataset_is_shown(
    write_latents: Callable[..., Path], begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, str(write_latents(tmp_path / "grown", count=32)), str(begun))
    assert "dataset.units: " in said


@pytest.mark.parametrize("lora", [(), ("--train.lora.rank", "2", "--train.lora.target-modules", "to_q,to_v")])
def test_another_unet_under_the_same_path_is_shown(
    latent_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: tuple[str, ...]
) -> None:
    """It may move, since it is known by what it is."""

    def save_base(folder: Path, seed: int) -> str:
        torch.manual_seed(seed)
        unet.save(unet.build("tiny", in_channels=3, num_classes=2, sample_size=8), folder)
        return unet.fingerprint(unet.load(folder))

    base, out = tmp_path / "base", tmp_path / "out"
    first = save_base(base, seed=0)
    job, _ = load(TrainJob, "train", [str(latent_folder), str(out), *SMALL, *lora, "--train.init", str(base)])
    dataset = LatentDataset.open(latent_folder)
    write_record(out, record_of(dataset, job.train, plan(dataset, job.train, None)))
    base.rename(tmp_path / "moved")
    again = (str(latent_folder), str(out), *lora, "--train.init")
    said = refusal(capsys, *again, str(tmp_path / "moved"), "--train.seed", "5")
    assert "(train.seed: 5, was 0)" in said
    other = save_base(base, seed=1)
    assert f"(info.init_fingerprint: {other}, was {first})" in refusal(capsys, *again, str(base))


def test_a_quarantined_input_must_be_accepted(
    write_latents: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_latents(tmp_path / "d")
    commit = folder / "commits/unit-000000.json"
    content = json.loads(commit.read_text())
    content |= {"num_inputs": 10, "num_quarantined": 2, "quarantined": {"truncated_image": 2}}
    commit.write_text(json.dumps(content))
    LatentDataset.open(folder).write_derived()
    said = refusal(capsys, str(folder), str(tmp_path / "out"))
    assert "2 of 22 inputs of " in said
    assert "are in quarantine (2 truncated_image); allowed: a share of 0" in said
    assert "--train.data.max-quarantined-share 0.091" in said


def test_an_output_that_cannot_be_written(
    latent_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write to " in refusal(capsys, str(latent_folder), str(tmp_path / "file" / "out"))


def test_snapshots_of_which_none_is_valid(
    latent_folder: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (begun / "snapshots/step-00000010").mkdir(parents=True)
    (begun / "snapshots/latest.json").write_text('{"step": 10}')
    said = refusal(capsys, str(latent_folder), str(begun))
    assert "no snapshot in " in said
    assert "(step 10: snapshot.json is missing); restore one of them" in said
