from typing import Any

import pytest

from ldm.model_card import ModelCard
from ldm.objective import NoiseSchedule
from pipelines.serve.config import ModelSource, ServeConfig
from pipelines.serve.generation_request import GenerationRequest
from pipelines.serve.image_plan import ImagePlan, Refusal, plan_images

# diffusers 0.42 converts its sigmas in a way that numpy 2 will stop to accept.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

CONFIG = ServeConfig(models={"base": ModelSource(folder="base")})  # type: ignore[arg-type]


def _card(**changes: Any) -> ModelCard:
    values: dict[str, Any] = {
        "folder": "base",
        "fingerprint": "f",
        "latent_shape": (4, 8, 8),
        "size_multiple": 2,
        "f": 8,
        "vae": "f8",
        "vae_fingerprint": "v",
        "shift": (0.0,) * 4,
        "scale": (1.0,) * 4,
        "scheduler_config": NoiseSchedule(prediction="v_prediction").scheduler_config(),
        "class_names": ("cat", "dog"),
        "preview": ((0.0, 0.0, 0.0),) * 5,
    }
    return ModelCard.model_validate(values | changes)


def _plans(
    body: dict[str, Any], card: ModelCard | None = None, factors: tuple[int, ...] = ()
) -> list[ImagePlan]:
    return plan_images(GenerationRequest(**body), {"base": card or _card()}, CONFIG, factors)


def test_defaults_are_the_models_and_the_servers() -> None:
    (plan,) = _plans({})
    assert (plan.model, plan.size_px, plan.scheduler) == ("base", (64, 64), "ddim")
    assert (plan.num_steps, plan.guidance, plan.stages) == (25, 3.0, 0)


def test_seeds_count_up_and_are_drawn_where_none_is_given() -> None:
    assert [plan.seed for plan in _plans({"n": 3, "seed": 2**63 - 2})] == [2**63 - 2, 2**63 - 1, 0]
    assert _plans({})[0].seed != _plans({})[0].seed


@pytest.mark.parametrize(("quality", "steps"), [("low", 12), ("medium", 25), ("hd", 50)])
def test_quality_is_a_number_of_steps(quality: str, steps: int) -> None:
    assert _plans({"quality": quality})[0].num_steps == steps
    assert _plans({"quality": quality, "num_inference_steps": 7})[0].num_steps == 7


def test_a_class_by_number_or_by_its_name_as_a_prompt() -> None:
    assert _plans({"class_label": 1})[0].class_label == 1
    assert _plans({"prompt": "dog"})[0].class_label == 1
    assert _plans({"prompt": "a dog"})[0].class_label is None


def test_a_prompt_is_part_of_the_image_only_where_the_model_reads_it() -> None:
    text = _card(class_names=None, text_encoder="clip", embedding_width=16)
    assert _plans({"prompt": "a dog", "negative_prompt": "blur"}, text)[0].prompt == "a dog"
    first, second = (_plans({"prompt": prompt, "seed": 0})[0] for prompt in ("a dog", "a cat"))
    assert first.key("f") == second.key("f")


def test_the_key_is_of_all_that_the_file_depends_on_and_of_nothing_else() -> None:
    plain = _plans({"seed": 1})[0].key("f")
    assert _plans({"seed": 1, "deadline_s": 5, "user": "me"})[0].key("f") == plain
    others: list[dict[str, Any]] = [
        {"seed": 2}, {"seed": 1, "num_inference_steps": 9}, {"seed": 1, "guidance_scale": 2},
        {"seed": 1, "class_label": 0}, {"seed": 1, "size": "128x64"}, {"seed": 1, "scheduler": "euler"},
        {"seed": 1, "output_format": "webp"}, {"seed": 1, "refresh_every": 2},
    ]  # fmt: skip
    keys = [_plans(body)[0].key("f") for body in others]
    assert len({plain, *keys}) == len(others) + 1
    assert _plans({"seed": 1})[0].key("another model") != plain


def test_the_cascade_is_known_by_the_side_that_it_makes() -> None:
    assert _plans({"upscale_to": 256}, factors=(4, 4))[0].stages == 1
    assert _plans({"upscale_to": 1024}, factors=(4, 4))[0].stages == 2
    with pytest.raises(Refusal, match="allowed: 256, 1024") as refused:
        _plans({"upscale_to": 512}, factors=(4, 4))
    assert refused.value.param == "upscale_to"


@pytest.mark.parametrize(
    ("body", "param", "allowed"),
    [
        ({"model": "other"}, "model", "base"),
        ({"class_label": 2}, "class_label", "0 to 1"),
        ({"scheduler": "flow_euler"}, "scheduler", "ddim"),
        ({"upscale_to": 128}, "upscale_to", "no upsamplers"),
    ],
)
def test_refusals_name_the_field_and_what_is_allowed(body: dict[str, Any], param: str, allowed: str) -> None:
    with pytest.raises(Refusal, match=allowed) as refused:
        _plans(body)
    assert refused.value.param == param


def test_guidance_needs_a_condition() -> None:
    unconditional = _card(class_names=None)
    assert _plans({}, unconditional)[0].guidance == 1.0
    with pytest.raises(Refusal) as refused:
        _plans({"guidance_scale": 2}, unconditional)
    assert refused.value.param == "guidance_scale"


def test_sides_are_multiples_of_what_the_model_takes() -> None:
    with pytest.raises(Refusal, match="multiples of 128"):
        _plans({"size": "64x128"}, _card(size_multiple=16))
