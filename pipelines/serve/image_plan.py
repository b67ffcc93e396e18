"""A request, resolved: every default filled in, everything checked, nothing computed yet."""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm.errors import UserError
from ldm.model_card import ModelCard
from ldm.sampling import MAX_SEED
from pipelines.serve.config import ServeConfig
from pipelines.serve.generation_request import GenerationRequest
from pipelines.serve.messages import ImageFormat

__all__ = ["ImagePlan", "Refusal", "plan_images"]

# OpenAI's names of how much work is put into an image, as shares of the default number of steps.
STEPS_BY_QUALITY = {"low": 0.5, "medium": 1.0, "standard": 1.0, "auto": 1.0, "high": 2.0, "hd": 2.0}
# Seeds that are drawn are short enough for JavaScript to count in.
MAX_DRAWN_SEED = 2**53 - 1


class Refusal(ValueError):
    """A request that cannot be served as it is; ``param``: the field that is wrong."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """One image: all that it depends on, and the file that is wanted.

    size_px: height and width of what the sampler makes. stages: of the cascade, that come after it.
    """

    model: str
    prompt: str
    negative_prompt: str
    class_label: int | None
    size_px: tuple[int, int]
    scheduler: str
    num_steps: int
    guidance: float
    seed: int
    refresh_every: int
    stages: int
    noise_level: int
    format: ImageFormat
    quality: int
    deadline_s: float | None

    def key(self, fingerprint: str) -> str:
        """Equal for equal files: of all but the deadline. fingerprint: of the model."""
        values = {**self.__dict__, "deadline_s": None, "fingerprint": fingerprint}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def plan_images(
    request: GenerationRequest,
    cards: Mapping[str, ModelCard],
    config: ServeConfig,
    factors: Sequence[int],
) -> list[ImagePlan]:
    """One plan for each of ``n`` images, with seeds that count up. factors: of the upsamplers.

    Raises `Refusal`.
    """
    model = request.model or next(iter(cards))
    if model not in cards:
        raise Refusal(f"no model {model!r}; allowed: {', '.join(cards)}", "model")
    card = cards[model]
    size_px = request.size_px or card.size_px
    _check_multiple(size_px, card)
    if request.refresh_every > 1 and not card.can_reuse:
        raise Refusal(f"refresh_every {request.refresh_every} for this model; allowed: 1", "refresh_every")
    first = ImagePlan(
        model=model,
        size_px=size_px,
        stages=_stages(request.upscale_to, size_px, factors),
        noise_level=config.default_upscale_noise,
        refresh_every=request.refresh_every,
        format=request.output_format,
        quality=request.output_compression,
        deadline_s=request.deadline_s,
        seed=secrets.randbelow(MAX_DRAWN_SEED) if request.seed is None else request.seed,
        **_condition(request, card),
        **_sampling(request, card, config),
    )
    return [replace(first, seed=(first.seed + index) % (MAX_SEED + 1)) for index in range(request.n)]


def _check_multiple(size_px: tuple[int, int], card: ModelCard) -> None:
    multiple = card.size_multiple_px
    if any(side % multiple for side in size_px):
        raise Refusal(
            f"size {size_px[1]}x{size_px[0]} for this model; allowed: multiples of {multiple}", "size"
        )


def _stages(upscale_to: int | None, size_px: tuple[int, int], factors: Sequence[int]) -> int:
    if upscale_to is None:
        return 0
    sides, side = [], max(size_px)
    for factor in factors:
        side *= factor
        sides.append(side)
    if upscale_to not in sides:
        allowed = ", ".join(map(str, sides)) or "nothing: this server has no upsamplers"
        raise Refusal(f"upscale_to {upscale_to}; allowed: {allowed}", "upscale_to")
    return sides.index(upscale_to) + 1


def _condition(request: GenerationRequest, card: ModelCard) -> dict[str, Any]:
    names = card.class_names or ()
    label = request.class_label
    if label is not None and label >= len(names):
        allowed = f"0 to {len(names) - 1}" if names else "none: the model has no classes"
        raise Refusal(f"class_label {label}; allowed: {allowed}", "class_label")
    if label is None and request.prompt in names:
        # Whoever knows nothing but prompts asks for a class by its name.
        label = names.index(request.prompt)
    has_text = card.condition == "text"
    return {
        "prompt": request.prompt if has_text else "",
        "negative_prompt": request.negative_prompt if has_text else "",
        "class_label": label,
    }


def _sampling(request: GenerationRequest, card: ModelCard, config: ServeConfig) -> dict[str, Any]:
    scheduler = request.scheduler or card.default_scheduler
    share = STEPS_BY_QUALITY[request.quality]
    default_steps = min(config.limits.max_steps, max(1, round(config.default_steps * share)))
    num_steps = request.num_inference_steps or default_steps
    guidance = 1.0 if card.condition == "none" else config.default_guidance
    if request.guidance_scale is not None:
        guidance = request.guidance_scale
    try:
        num_steps = card.check(scheduler, num_steps, guidance)
    except UserError as error:
        raise Refusal(str(error), _named(str(error))) from error
    return {"scheduler": scheduler, "num_steps": num_steps, "guidance": guidance}


def _named(message: str) -> str:
    if "guidance" in message:
        return "guidance_scale"
    return "scheduler" if "scheduler" in message else "num_inference_steps"
