"""``ldm plan``: its example and page, its tables and JSON, rates of a benchmark, and mistakes in a plan."""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cli
from jobs.plan_view import text_of
from pipelines.planning.figures import Figure

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "jobs/plan_example.yaml"
PAGE = ROOT / "docs/sizing.md"


def plan(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[dict[str, Any], str]:
    """The JSON of a command that ends well, and what else it printed."""
    assert cli.main(["plan", *args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    *tables, line = out.splitlines()
    return json.loads(line), "\n".join(tables)


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(["plan", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.removeprefix("ldm plan: error: ").rstrip("\n")


@pytest.fixture
def example() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    return loaded


def written(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    result, tables = plan(capsys, str(EXAMPLE))
    assert [column["images"] for column in result["plans"]] == [10**7, 10**9, 10**10]
    for column in result["plans"]:
        encode = {name: figure["value"] for name, figure in column["encode"].items()}
        # Two units of 256 images again and 60 s, 0.05 times in each device-hour; 33.8 images/s.
        speed = 33.8 * (0.9 if encode["devices"] > 1 else 1)
        useful = 1 - 0.05 * (512 / speed + 60) / 3600
        hours = column["images"] / (encode["devices"] * speed * useful) / 3600
        assert encode["hours"] == pytest.approx(hours)
        assert hours <= 168 < hours * encode["devices"] / max(encode["devices"] - 1, 0.1)
        assert column["encode"]["rate of a device"]["origin"] == "measured"
        # Measured at 64 px, planned at 256 px.
        rate = column["train"]["rate of a device"]
        assert (rate["value"], rate["origin"]) == (pytest.approx(197 / 16), "extrapolated")
        assert column["cost"] == {} and "encode.price_per_device_hour" in column["missing_for_a_total"]
    assert "no total cost: encode.price_per_device_hour, " in tables
    assert "10,000,000,000 images: 39,062,500 units" in tables


def test_every_figure_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    result, tables = plan(capsys, str(EXAMPLE))
    for column in result["plans"]:
        for stage in ("encode", "train"):
            for name, figure in column[stage].items():
                assert figure["origin"] in ("measured", "given", "assumed", "extrapolated")
                assert re.search(rf"│ {re.escape(name)} .*{figure['origin']}", tables)


def test_the_page_has_the_figures_of_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = plan(capsys, str(EXAMPLE))
    page = PAGE.read_text()
    for name in ("devices", "hours", "device-hours", "storage", "units", "files"):
        figures = [Figure(**column["encode"][name]) for column in result["plans"]]
        assert f"| {name} | {' | '.join(map(text_of, figures))} | {figures[0].origin} |" in page
    train = result["plans"][0]["train"]
    for name in ("rate of a device", "rate of all devices", "hours", "latents to a node"):
        assert f"| {name} | {text_of(Figure(**train[name]))} | {train[name]['origin']} |" in page


def test_rates_of_a_benchmark(
    tmp_path: Path, example: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bench = tmp_path / "bench.json"
    bench.write_text('— efficiency\n{"pipeline_images_per_s": 1000.0, "bytes_fp16": 9000.0}\n')
    day = datetime(2026, 3, 4, 23, 30, tzinfo=UTC).timestamp()
    os.utime(bench, (day, day))
    example["encode"] |= {"device": "one L4 [spot]", "rates": []}
    result, tables = plan(capsys, written(tmp_path, example), "--rates", str(bench))
    rate = result["plans"][0]["encode"]["rate of a device"]
    told = "at 256 px: ldm bench encode --json, 2026-03-04"
    assert (rate["value"], rate["origin"], rate["note"]) == (1000, "measured", told)
    assert result["plans"][0]["encode"]["bytes of an image"]["value"] == 9000
    assert "encode: one L4 [spot]" in tables


def test_cost_in_the_currency_of_the_plan(
    tmp_path: Path, example: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    prices = {"currency": "CHF", "gb_month": 0, "storage_months": 0, "egress": []}
    changed = example | {"images": [1_000_000], "train": None, "prices": prices}
    changed["encode"] |= {"price_per_device_hour": 2, "preemption": None}
    result, tables = plan(capsys, written(tmp_path, changed))
    total = result["plans"][0]["cost"]["total"]["value"]
    assert total == pytest.approx(2 * 1_000_000 / 33.8 / 3600)
    assert result["currency"] == "CHF" and f"{total:.2f} CHF" in tables


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("encode", {"rates": [{"images_per_s": -3, "size_px": 256}]}, "is -3; allowed: greater than 0"),
        ("encode", {"rates": [{"images_per_s": float("nan"), "size_px": 256}]}, "rates.0.images_per_s"),
        ("encode", {"rates": [{"images_per_s": float("inf"), "size_px": 256}]}, "rates.0.images_per_s"),
        ("encode", {"rates": []}, "encode has no rate; measure one"),
        (
            "encode",
            {"deadline_h": None, "devices": 0},
            "encode.devices in {plan} is 0; allowed: greater than 0",
        ),
        ("encode", {"deadline_h": 0.000_001}, "cannot be done by then; allowed: at least"),
        ("encode", {"devices": 4}, "give one of devices and deadline_h, and not both"),
        (
            "encode",
            {"devices": 3, "deadline_h": None, "devices_per_node": 2},
            "3 devices do not fill nodes of 2",
        ),
        ("encode", {"max_devices": 1, "devices_per_node": 2}, "max_devices 1 is less than a node of 2"),
        ("encode", {"devices": 4, "deadline_h": None, "max_devices": 8}, "max_devices is for a deadline"),
        (
            "encode",
            {"deadlin_h": 3},
            "unknown option encode.deadlin_h in {plan}; did you mean 'encode.deadline_h'?",
        ),
        (
            "encode",
            {"scaling": {"efficiency": 1.5}},
            "encode.scaling.efficiency in {plan} is 1.5; allowed: less",
        ),
        ("train", {"devices": 7}, "a batch of 256 cannot be shared by 7 devices evenly"),
        ("train", {"size_px": 512}, "train.size_px is 512; allowed: one of the dataset's, 256"),
        ("dataset", {"sizes_px": [250]}, "size 250 px; allowed: multiples of f, 8"),
        ("dataset", {"sizes_px": [256, 256]}, "sizes_px names a size twice"),
    ],
)
def test_a_mistake_in_a_plan_is_one_line(
    section: str,
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    example: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    example[section] |= changes
    path = written(tmp_path, example)
    assert said.format(plan=path) in refusal(capsys, path)


def test_other_mistakes(tmp_path: Path, example: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    del example["encode"]["vae"]
    assert refusal(capsys, written(tmp_path, example)).endswith("plan.yaml is missing; add it")
    nothing = {key: example[key] for key in ("images", "dataset")}
    assert refusal(capsys, written(tmp_path, nothing)).startswith(
        "nothing to plan; give encode, train or both"
    )
    assert refusal(capsys, str(tmp_path)).startswith("no such plan: ")
    (tmp_path / "no.yaml").write_text("- 1")
    assert "holds no options" in refusal(capsys, str(tmp_path / "no.yaml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory"),
        ("", "its last line is not JSON"),
        ("no JSON", "its last line is not JSON"),
        ("[1]", "no JSON object"),
        ('{"speed": 1}', "has no figure that this plan has a use for"),
    ],
)
def test_rates_that_cannot_be_read(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = tmp_path / "bench.json"
    if text is not None:
        bench.write_text(text)
    assert said in refusal(capsys, str(EXAMPLE), "--rates", str(bench))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (8.064e11, "B", "806.4 GB"),
        (999, "B/s", "999 B/s"),
        (1.5e16, "B", "15 PB"),
        (0.001067, "share", "0.11%"),
        (82.268, "h", "82.27 h"),
        (9141.07, "h", "9,141 h"),
        (55, "", "55"),
        (1234.5, "currency", "1,234.50 EUR"),
    ],
)
def test_text_of_a_figure(value: float, unit: str, text: str) -> None:
    assert text_of(Figure(value, unit, "given"), "EUR") == text
