"""Whole plans, by hand arithmetic."""

from math import ceil
from typing import Any

import pytest

from ldm.errors import UserError
from pipelines.encode.actors import CALLS_AT_ONCE
from pipelines.planning.config import PlanConfig
from pipelines.planning.encode import UNITS_AT_AN_ENCODER
from pipelines.planning.figures import Figure
from pipelines.planning.plan import Column, make_plan

MEASURED = {"command": "ldm bench encode --json", "when": "2026-11-24"}
DATASET = {"f": 8, "channels": 4, "sizes_px": [256], "unit_size": 100, "source_bytes_per_image": 50_000}
ENCODE = {
    "device": "X",
    "vae": "f8",
    "rates": [{"images_per_s": 100, "size_px": 256, "measured": MEASURED}],
    "devices_per_node": 2,
    "devices": 4,
    "scaling": {"efficiency": 0.5},
    "price_per_device_hour": 1.5,
}
TRAIN = {
    "device": "Y",
    "preset": "small",
    "rates": [{"images_per_s": 400, "size_px": 256}],
    "devices_per_node": 2,
    "devices": 8,
    "scaling": {"efficiency": 0.5, "measured": MEASURED},
    "size_px": 256,
    "steps": 18_000,
    "batch_size": 640,
    "num_params": 1_000_000,
    "price_per_device_hour": 2,
}
PRICES = {"currency": "EUR", "gb_month": 0.02, "storage_months": 3, "gb_egress": 0.1, "egress": ["latents"]}
ROW = 2 * 4 * 32 * 32 * 2 + 4


def planned(**parts: Any) -> Column:
    """720,000 images; parts replace those above, None leaves one out."""
    whole: dict[str, Any] = {
        "images": [720_000], "dataset": DATASET, "encode": ENCODE, "train": TRAIN, "prices": PRICES,
    } | parts  # fmt: skip
    (column,) = make_plan(PlanConfig.model_validate(whole))
    return column


def values(figures: dict[str, Figure]) -> dict[str, float]:
    return {name: figure.value for name, figure in figures.items()}


def origins(figures: dict[str, Figure]) -> dict[str, str]:
    return {name: figure.origin for name, figure in figures.items()}


def test_encoding() -> None:
    assert values(planned().stages["encode"]) == pytest.approx(
        {
            "rate of a device": 100,
            "efficiency": 0.5,
            "lost to preemptions": 0,
            "start": 0,
            "devices": 4,
            "nodes": 2,
            "rate of all devices": 200,
            "hours": 1,
            "device-hours": 4,
            "cost of devices": 6,
            # 4 units at each of 2 encoders and 2 that are decoded, these with their images; half is filled.
            "object store of a node": 2 * (10 * 100 * 3 * 256 * 256 + 2 * 100 * 50_000),
            "latents from a node": 100 * ROW,
            "images to a node": 100 * 50_000,
            "pixels to a node": 100 * 3 * 256 * 256,
            "bytes of an image": ROW,
            "storage": 720_000 * ROW,
            "units": 7200,
            "files": 14_400,
        }
    )


def test_training() -> None:
    found = planned().stages["train"]
    assert values(found) == pytest.approx(
        {
            "images trained on": 11_520_000,
            "rate of a device": 400,
            "efficiency": 0.5,
            "lost to preemptions": 0,
            "start": 0,
            "devices": 8,
            "nodes": 4,
            "rate of all devices": 1600,
            "hours": 2,
            "device-hours": 16,
            "cost of devices": 32,
            "a step": 0.4,
            "latents to a node": 400 * ROW,
            "latents read": 11_520_000 * ROW,
            # A ring of 4 sends 2 · 3/4 of 4 MB in every step, 2.5 times a second.
            "gradients from a node": 15_000_000,
            "epochs": 16,
        }
    )


def test_cost() -> None:
    column = planned()
    storage, egress = 720_000 * ROW / 1e9 * 0.02 * 3, 11_520_000 * ROW / 1e9 * 0.1
    parts = {"devices of encode": 6, "devices of train": 32, "storage": storage, "egress": egress}
    assert values(column.cost) == pytest.approx({**parts, "total": sum(parts.values())})
    assert column.missing == []
    images = planned(prices=PRICES | {"egress": ["images"]}).cost["egress"].value
    assert images == pytest.approx(720_000 * 50_000 / 1e9 * 0.1)
    assert "egress" not in planned(prices=PRICES | {"egress": [], "gb_egress": None}).cost


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        ({"prices": None}, ["prices.gb_month", "prices.storage_months", "prices.egress"]),
        ({"prices": PRICES | {"gb_month": None}}, ["prices.gb_month"]),
        ({"prices": PRICES | {"gb_egress": None}}, ["prices.gb_egress"]),
        ({"encode": ENCODE | {"price_per_device_hour": None}}, ["encode.price_per_device_hour"]),
        (
            {
                "dataset": DATASET | {"source_bytes_per_image": None},
                "prices": PRICES | {"egress": ["images", "latents"]},
            },
            ["dataset.source_bytes_per_image"],
        ),
    ],
)
def test_without_a_price_there_is_no_total(parts: dict[str, Any], missing: list[str]) -> None:
    column = planned(**parts)
    assert column.missing == missing
    assert "total" not in column.cost
    assert values(column.stages["encode"])["hours"] == 1


def test_what_is_measured_given_assumed_and_extrapolated() -> None:
    encode, train = planned().stages["encode"], planned().stages["train"]
    assert encode["rate of a device"] == Figure(
        100, "images/s", "measured", "at 256 px: ldm bench encode --json, 2026-11-24"
    )
    assert {name: origins(encode)[name] for name in ("efficiency", "devices", "storage", "start")} == {
        "efficiency": "given", "devices": "given", "storage": "given", "start": "assumed",
    }  # fmt: skip
    assert encode["hours"].origin == encode["cost of devices"].origin == "extrapolated"
    assert (train["rate of a device"].origin, train["efficiency"].origin) == ("given", "measured")
    assumed = planned(encode=ENCODE | {"scaling": None}).stages["encode"]["efficiency"]
    assert (assumed.value, assumed.origin) == (0.9, "assumed")


def test_two_sizes_and_mirrored_latents_take_a_pass_each() -> None:
    """At 512 px a quarter of the rate: 10 ms and 40 ms for each pass."""
    dataset = DATASET | {"sizes_px": [256, 512], "form": {"mirrored": True}}
    found = planned(dataset=dataset).stages["encode"]
    assert found["rate of a device"].value == pytest.approx(1 / (2 * 0.05))
    assert found["rate of a device"].origin == "extrapolated"
    assert found["files"].value == 3 * 7200
    both = ENCODE | {"rates": [*ENCODE["rates"], {"images_per_s": 20, "size_px": 512}]}  # type: ignore[misc]
    found = planned(dataset=dataset, encode=both).stages["encode"]
    assert found["rate of a device"].value == pytest.approx(1 / (2 * 0.06))


def test_cpus_that_decode() -> None:
    encode = ENCODE | {"decode": {"images_per_s": 30}}
    found = planned(encode=encode).stages["encode"]
    assert found["CPUs that decode for a node"].value == pytest.approx(100 / 30)
    store = 2 * (12 * 100 * 3 * 256 * 256 + 4 * 100 * 50_000)
    assert found["object store of a node"].value == store


def test_preemptions_of_encoders_and_of_a_training() -> None:
    lost = {"preemption": {"per_device_hour": 3, "restart_s": 56}}
    column = planned(encode=ENCODE | lost, train=TRAIN | lost | {"checkpoint_every": 10})
    # An encoder does two units of 100 again, at 50 images/s; a training of 4 nodes 10 steps of 0.4 s.
    assert column.stages["encode"]["lost to preemptions"].value == pytest.approx(3 * (4 + 56) / 3600)
    assert column.stages["encode"]["hours"].value == pytest.approx(1 / 0.95)
    assert column.stages["train"]["lost to preemptions"].value == pytest.approx(4 * 3 * (4 + 56) / 3600)
    assert column.stages["train"]["hours"].value == pytest.approx(2 / 0.8)


def test_a_deadline_gives_the_fewest_nodes() -> None:
    encode = {key: value for key, value in ENCODE.items() if key != "devices"} | {"deadline_h": 0.3}
    train = {key: value for key, value in TRAIN.items() if key != "devices"} | {"deadline_h": 1}
    column = planned(encode=encode, train=train)
    found = column.stages["encode"]
    assert (found["nodes"].value, found["nodes"].origin) == (ceil(720_000 / 1080 / 100), "extrapolated")
    assert found["hours"].value <= 0.3 < found["hours"].value * 7 / 6
    # 16 devices would do, and share a batch of 640 evenly; 18 would not.
    assert column.stages["train"]["devices"].value == 16
    tighter = planned(encode=encode, train=train | {"deadline_h": 0.95})
    assert tighter.stages["train"]["devices"].value == 20


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        (
            "encode",
            {"devices": None, "deadline_h": 1e-6},
            "cannot be done by then; allowed: at least 0.0005556",
        ),
        ("encode", {"devices": None, "deadline_h": 0.3, "max_devices": 11}, "at least 0.4; give more time"),
        ("train", {"devices": None, "deadline_h": 0.001}, "train.deadline_h is 0.001, and 11,520,000 images"),
        ("encode", {"preemption": {"per_device_hour": 60, "restart_s": 60}}, "leave encode no progress on 4"),
        (
            "train",
            {"devices": None, "deadline_h": 9, "preemption": {"per_device_hour": 60, "restart_s": 60}},
            "leave train no progress on any number",
        ),
        ("encode", {"devices": 7202}, "720,000 images are 7200 units, fewer than devices"),
        ("encode", {"rates": []}, "encode has no rate; measure one on a device of the plan"),
        ("train", {"rates": []}, "train has no rate; measure one on a device of the plan"),
    ],
)
def test_a_plan_that_cannot_be_carried_out(stage: str, changes: dict[str, Any], said: str) -> None:
    base = {"encode": ENCODE, "train": TRAIN}[stage]
    with pytest.raises(UserError) as caught:
        planned(**{stage: base | changes})
    assert said in str(caught.value)


def test_many_units_are_noted() -> None:
    assert planned().notes == []
    assert "1,000,000 units: going on" in planned(images=[100_000_000]).notes[0]


def test_an_encoder_has_as_many_units_as_ray_data_gives_it() -> None:
    from ray.data.context import DEFAULT_ACTOR_MAX_TASKS_IN_FLIGHT_TO_MAX_CONCURRENCY_FACTOR as FACTOR

    assert UNITS_AT_AN_ENCODER == FACTOR * CALLS_AT_ONCE
