"""``ldm runs``: lists, comparisons, and the way from pictures to a checkpoint by fingerprints."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import cli
from jobs.current_run import recorded
from jobs.encode import EncodeJob
from jobs.run_record import Machine, RunRecord, write_record
from jobs.train import TrainJob
from pipelines.process import this_process


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert cli.main(["runs", *arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def record(output: Path, number: int, **changes: Any) -> RunRecord:
    written = RunRecord(
        run=f"20261129T12000{number}Z-{number:08x}",
        command="encode",
        line="ldm encode",
        config={"vae": "f8", "encoder": {"max_size": number}},
        versions={"torch": "2.14.0"},
        commit="a" * 40,
        process=this_process(),
        machine=Machine(host="h", cpus=2),
        started=f"2026-11-29T12:00:0{number}.000+00:00",
        ended=None,
        seconds=75.0,
        status="done",
        output=str(output),
        figures={"rows": 20 + number, "images_per_s": 12.345678},
    ).model_copy(update=changes)
    write_record(written)
    return written


def test_a_table_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "b", 2, status="failed", seconds=3.21)
    record(tmp_path / "a", 1)
    assert cli.main(["runs", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first, second = lines[1:]
    assert first[:5] == ["20261129T120001Z-00000001", "encode", "a", "2026-11-29", "12:00"]
    assert first[5:] == ["1:15", "done", "rows", "21,", "images_per_s", "12.35"]
    assert second[5:8] == ["3.2", "s", "failed"]
    assert [run["run"][-1] for run in run_json(capsys, str(tmp_path / "a"))["runs"]] == ["1"]


def test_what_differs_between_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "a", 1)
    record(tmp_path / "a", 2, versions={"torch": "2.15.0"}, seconds=80.0)
    found = run_json(capsys, str(tmp_path / "a"), "--compare", "00000001,20261129T120002Z")
    assert found["compare"] == {
        "seconds": [75.0, 80.0],
        "config.encoder.max_size": [1, 2],
        "versions.torch": ["2.14.0", "2.15.0"],
        "figures.rows": [21, 22],
    }


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(tmp_path)]) == 2
    assert "no runs are recorded beside" in capsys.readouterr().err
    record(tmp_path / "a", 1)
    record(tmp_path / "a", 2)
    assert cli.main(["runs", str(tmp_path / "a"), "--compare", "20261129,3"]) == 2
    assert "2 runs have an id like '20261129'" in capsys.readouterr().err
    assert cli.main(["runs", str(tmp_path / "a"), "--compare", "1,2", "--lineage"]) == 2
    assert "two views" in capsys.readouterr().err
    assert cli.main(["runs", str(tmp_path / "a"), "--compare", "1"]) == 2
    assert "give two runs, as A,B" in capsys.readouterr().err
    next((tmp_path / "a.runs").iterdir()).write_text('{"run": 3}')
    assert cli.main(["runs", str(tmp_path / "a")]) == 2
    assert "is no run record that this version reads" in capsys.readouterr().err


def train(dataset: Path, out: Path, checkpoint: Path) -> None:
    """Leave what `ldm train` leaves: a checkpoint, and which rows it is of."""
    with recorded("train", [str(dataset), str(out)], TrainJob(dataset=str(dataset), out=out)) as tell:
        shutil.copytree(checkpoint, out)
        of = {
            "dataset.header": hashlib.sha256((dataset / "dataset.json").read_bytes()).hexdigest(),
            "dataset.units": json.loads((dataset / "stats.json").read_bytes())["units_sha256"],
        }
        (out / "run.json").write_text(json.dumps(of))
        tell({"step": 7, "loss": 0.25})


@pytest.fixture
def chain(
    tmp_path: Path,
    vae_folder: Path,
    write_latents: Callable[..., Path],
    checkpoint_folders: dict[str, Path],
    photo: Callable[[int], bytes],
) -> Path:
    """pictures → shards → latents → model in one folder, as `ldm shards`, `encode`, `train` leave them."""
    (tmp_path / "pictures").mkdir()
    for index in range(4):
        (tmp_path / f"pictures/{index}.png").write_bytes(photo(index))
    out = tmp_path / "out"
    assert cli.main(["shards", str(tmp_path / "pictures"), str(out / "shards")]) == 0
    job = EncodeJob(input=str(out / "shards"), output=str(out / "latents"), vae=str(vae_folder))
    with recorded("encode", [], job):
        write_latents(out / "latents")
    train(out / "latents", out / "model", checkpoint_folders["v_prediction"])
    return out


def test_from_pictures_to_a_checkpoint_and_back(
    chain: Path, tmp_path: Path, vae_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint alone is named: the rest is found by what each run has read."""
    capsys.readouterr()
    found = run_json(capsys, str(chain / "model"), "--lineage")
    assert found["findings"] == []
    shards, encode, training = found["lineage"]
    assert [run["command"] for run in found["lineage"]] == ["shards", "encode", "train"]
    assert [each["kind"] for each in shards["inputs"]] == ["images"]
    assert [each["kind"] for each in encode["inputs"]] == ["shards", "vae"]
    assert encode["inputs"][0] == shards["outputs"][0]
    assert training["inputs"] == encode["outputs"]
    (dataset,), (model,) = encode["outputs"], training["outputs"]
    assert dataset["made_of"] == {"vae": encode["inputs"][1]["fingerprint"]}
    assert model["made_of"] == {
        "vae": encode["inputs"][1]["fingerprint"], "dataset": dataset["fingerprint"],
    }  # fmt: skip
    states = [each["now"] for run in found["lineage"] for each in (*run["inputs"], *run["outputs"])]
    assert states == ["as it was"] * 7
    assert cli.main(["runs", str(chain), "--lineage"]) == 0
    vae = encode["inputs"][1]["fingerprint"][:12]
    tree = [line.strip("└─├│ ").split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[-1]) for line in tree] == [
        ("images", "was"), ("shards", "done"), ("shards", "was"), ("encode", vae),
        ("dataset", "was"), ("train", "done"), ("checkpoint", "was"),
    ]  # fmt: skip


def test_what_contradicts_its_records_is_found(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = chain / "model/run.json"
    run_file.write_text(run_file.read_text().replace('"dataset.units": "', '"dataset.units": "0'))
    capsys.readouterr()
    assert cli.main(["runs", str(chain), "--lineage"]) == 1
    (finding,) = [line for line in capsys.readouterr().out.splitlines() if "says that it is of" in line]
    assert finding.startswith(f"checkpoint {chain}/model says that it is of dataset ")
    weights = next((chain / "model/unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"0")
    assert cli.main(["runs", str(chain), "--lineage"]) == 1
    out = capsys.readouterr().out
    assert f"checkpoint {chain}/model is not what its last run " in out
    shutil.rmtree(chain / "latents")
    assert cli.main(["runs", str(chain), "--lineage"]) == 1
    assert "  gone" in capsys.readouterr().out
