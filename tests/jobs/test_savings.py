"""``ldm savings``: its JSON and page on a small layout, and the process that measures steps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import cli
from jobs.bench import bursts, denoise_step
from jobs.bench.peak_rss import PeakRss
from jobs.savings_view import SavingsResult, StepFigures, sheets
from ldm import unet
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
    result = SavingsResult("a", rows, "b", rows, 1, {"sampling": steps}, [])
    measured = {f.claim.f: f for f in result.findings if f.found_in.startswith("seconds, a step of sampling")}
    assert measured[4].verdict == "holds"
    assert (measured[16].value, measured[16].verdict) == (256, "more")
    assert [sheet.title for sheet in sheets(result)][2].startswith("Steps of 1 images: b, measured here")


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


def test_memory_that_was_freed_again_is_in_the_peak() -> None:
    peak = PeakRss()
    np.ones(4_000_000).sum()
    assert peak.growth_bytes() == pytest.approx(32e6, rel=0.1)


def test_bursts_take_turns() -> None:
    called: list[str] = []
    ways = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    assert set(bursts.median_seconds(ways, 0.0)) == {"a", "b"}
    assert called == ["a", "b"] * (1 + bursts.MIN_ROUNDS)
