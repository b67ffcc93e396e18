"""JSON lines of benchmarks become rates of a plan."""

from datetime import date
from typing import Any

import pytest

from ldm.errors import UserError
from pipelines.planning.bench_rates import with_bench
from pipelines.planning.config import Measurement, PlanConfig, Rate, StoredRow

DAY = date(2026, 11, 24)
ENCODE_LINE = {"pipeline_images_per_s": 34.0, "efficiency": 1.0, "bytes_fp16": 11_200.5, "bytes_int8": 6700.0}
TRAIN_LINE = {"train_images_per_s": 197.0, "cached_images_per_s": 12.5, "speed": 0.99}


def plan(dataset: dict[str, Any] | None = None, **stages: Any) -> PlanConfig:
    one = {"device": "X", "devices_per_node": 1, "devices": 1}
    training = {"preset": "small", "size_px": 256, "steps": 1, "batch_size": 1}
    return PlanConfig.model_validate(
        {
            "images": [1000],
            "dataset": {"f": 8, "channels": 4, "sizes_px": [256]} | (dataset or {}),
            "encode": one | {"vae": "f8"} | stages.get("encode", {}),
            "train": one | training | stages.get("train", {}),
        }
    )


def test_rates_of_encoding_with_command_and_day() -> None:
    found = with_bench(plan(), ENCODE_LINE, DAY, "bench.json")
    measured = Measurement(command="ldm bench encode --json", when=DAY)
    assert found.encode is not None
    assert found.encode.rates == (Rate(images_per_s=34, size_px=256, measured=measured),)
    assert found.dataset.stored_row == StoredRow(num_bytes=11_200.5, size_px=256, measured=measured)
    assert found.train == plan().train


def test_rates_of_training_at_two_sizes() -> None:
    found = with_bench(plan(), TRAIN_LINE, DAY, "bench.json").train
    assert found is not None
    assert [(rate.size_px, rate.images_per_s) for rate in found.rates] == [(64, 197), (256, 12.5)]


def test_they_replace_what_was_given_for_the_same_size() -> None:
    given = [{"images_per_s": 1, "size_px": 256}, {"images_per_s": 2, "size_px": 512}]
    found = with_bench(plan(encode={"rates": given}), ENCODE_LINE, DAY, "bench.json").encode
    assert found is not None
    assert [(rate.size_px, rate.images_per_s) for rate in found.rates] == [(512, 2), (256, 34)]


def test_a_row_of_the_plan_s_own_form() -> None:
    int8 = with_bench(plan({"form": {"dtype": "int8"}}), ENCODE_LINE, DAY, "x").dataset.stored_row
    assert int8 is not None and int8.num_bytes == 6700
    for other in ({"stored": "mode"}, {"mirrored": True}):
        assert with_bench(plan({"form": other}), ENCODE_LINE, DAY, "x").dataset.stored_row is None


@pytest.mark.parametrize(
    ("config", "line", "said"),
    [
        (plan(), {"goodput": 4.0}, "x has no figure that this plan has a use for"),
        (plan(), {"pipeline_images_per_s": -1.0}, "pipeline_images_per_s in x is -1.0; allowed: a number"),
        (plan(), {"pipeline_images_per_s": "NaN"}, "pipeline_images_per_s in x is 'NaN'"),
        (plan(), {"train_images_per_s": True}, "train_images_per_s in x is True"),
        (plan(encode={"vae": "sd"}), ENCODE_LINE, "measured with VAE f8, and the plan has encode.vae sd"),
        (plan(train={"preset": "base"}), TRAIN_LINE, "U-Net small, and the plan has train.preset base"),
        (plan({"f": 16}), TRAIN_LINE, "latents of f = 8 and 4 channels, and the plan has latents of f = 16"),
    ],
)
def test_a_line_that_the_plan_cannot_use(config: PlanConfig, line: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        with_bench(config, line, DAY, "x")
    assert said in str(caught.value)
