"""``ldm savings``: its JSON and page on a small layout, and the process that measures steps."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import cli
from jobs.bench import bursts, denoise_step
from jobs.bench.peak_rss import PeakRss
from jobs.bench.reduced import check_checkpoint, unet_rows
from jobs.savings_view import SavingsResult, StepFigures, sheets
from ldm import unet
from ldm.checkpoint import INFO_FILE, read_info
from ldm.errors import UserError
from ldm.features import load_extractor
from ldm.savings import ledger

PARAMS = unet.PRESETS["tiny"].num_params


def test_what_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "made/page.html"
    command = f"savings --layout tiny --preset tiny --size-px 64 --measured-size-px 64 --page {page} --json"
    assert cli.main([*command.split(), "--only", "[]"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["counted"]["8"]["weight_bytes"] == 2 * PARAMS  # fp16
    assert result["run_here"]["8"]["weight_bytes"] == 4 * PARAMS
    assert result["measured"] == {}
    assert result["sizes"] == []
    found = {(f["claim"]["kind"], f["claim"]["f"]): f for f in result["findings"] if "fp32" in f["found_in"]}
    assert found["positions", 16]["value"] == 256
    assert found["memory", 16]["verdict"] == "more"  # `weights and activations`, the last of memory
    html = page.read_text()
    assert "DIFFERS: more" in html and "weights do not shrink with f" in html
    assert "http" not in html.replace("http://www.w3.org", "")


def test_measured_steps_are_claims_evidence() -> None:
    rows = ledger("tiny", 64)
    steps = {f: StepFigures(1.0 / f**2, 1e9 / f, 4) for f in rows}
    result = SavingsResult("a", rows, "b", rows, 1, "here", {"sampling": steps}, [])
    measured = {f.claim.f: f for f in result.findings if f.found_in.startswith("seconds, a step of sampling")}
    assert measured[4].verdict == "holds"
    assert (measured[16].value, measured[16].verdict) == (256, "more")
    assert sheets(result)[2].title == "Steps at batch size 1: b, measured here"
    assert sheets(result)[2].note.endswith("here.")


@pytest.mark.parametrize("kind", ["sampling", "training"])
def test_a_process_measures_its_own_steps(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "latents.npy"
    np.save(file, np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32))
    with torch.random.fork_rng():
        denoise_step.main(kind, "tiny", str(file), "0.01", "1")
    figures = json.loads(capsys.readouterr().out)
    assert figures["seconds"] > 0
    assert figures["weight_bytes"] == 4 * PARAMS
    # New weights are resident; training has two averages and a gradient of each beside it.
    assert figures["peak_bytes"] > (4 if kind == "training" else 1) * figures["weight_bytes"] * 0.8


def test_half_precision_of_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "savings --quantise --images 2 --measured-size-px 64 --seconds 0.01 --threads 1 --json"
    assert cli.main([*command.split(), "--page", str(tmp_path / "page.html")]) == 0
    exact, half, bfloat = json.loads(capsys.readouterr().out.splitlines()[-1])["reduced"]
    assert [row["form"] for row in (exact, half, bfloat)] == ["float32", "float16", "bfloat16"]
    assert half["weight_bytes"] == bfloat["weight_bytes"] == exact["weight_bytes"] / 2
    assert (exact["speed"], exact["psnr_db"], exact["fd"]) == (1, "Infinity", pytest.approx(0, abs=1e-6))
    # fp16 has three bits more of mantissa.
    assert half["psnr_db"] > bfloat["psnr_db"] + 10 > 40
    assert half["num_repeated"] == 0


@pytest.mark.filterwarnings("ignore")  # torchao warns of its own parts
def test_quantised_checkpoint(checkpoint_folders: dict[str, Path]) -> None:
    pytest.importorskip("torchao")
    for folder in checkpoint_folders.values():
        check_checkpoint(folder)
        exact, int8, dynamic = unet_rows(folder, 3, 2, load_extractor("random"), 0.01)
        assert exact.weight_bytes > int8.weight_bytes == dynamic.weight_bytes
        assert exact.psnr_db == float("inf")
        assert 20 < dynamic.psnr_db < int8.psnr_db < 100


def test_a_checkpoint_of_another_kind(checkpoint_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "upsampler"
    shutil.copytree(checkpoint_folders["flow"], folder)
    info = read_info(folder).model_copy(update={"upsampling_factor": 4, "max_noise_level": 10})
    (folder / INFO_FILE).write_text(info.model_dump_json())
    with pytest.raises(UserError, match="is an upsampler; allowed: a checkpoint with classes"):
        check_checkpoint(folder)


def test_memory_that_was_freed_again_is_in_the_peak() -> None:
    peak = PeakRss()
    np.ones(4_000_000).sum()
    assert peak.growth_bytes() == pytest.approx(32e6, rel=0.1)


def test_bursts_take_turns() -> None:
    called: list[str] = []
    ways = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    assert set(bursts.median_seconds(ways, 0.0)) == {"a", "b"}
    assert called == ["a", "b"] * (1 + bursts.MIN_ROUNDS)
