"""What a client may ask for: OpenAI's fields of an image generation, and this server's own.

Everything is checked before a model is touched, against the limits of the server.
"""

from typing import Annotated, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ldm.sampling import MAX_SEED, MAX_STEPS, SCHEDULERS

__all__ = ["GenerationRequest", "Limits", "SizePx"]

SizePx: TypeAlias = tuple[int, int]

Quality = Literal["auto", "standard", "hd", "low", "medium", "high"]


class Limits(BaseModel):
    """What one request may ask of a server; all of it bounds time and memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sizes_multiple_px: PositiveInt = Field(64, description="sides of images are multiples of it")
    max_side_px: PositiveInt = 1024
    max_images: PositiveInt = Field(4, description="n of a request")
    max_steps: PositiveInt = Field(100, le=MAX_STEPS)
    max_guidance: PositiveFloat = 50.0
    max_prompt_chars: PositiveInt = 4000
    max_upscale_px: PositiveInt = Field(8192, description="longer side of an upscaled image")
    max_deadline_s: PositiveFloat = 3600.0


class GenerationRequest(BaseModel):
    """Body of ``POST /v1/images/generations``.

    Validate it with the server's `Limits` as context ``limits``. OpenAI's ``background``, ``moderation`` and
    ``style`` are accepted, and change nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = ""
    model: str | None = Field(None, max_length=200)
    n: PositiveInt = 1
    size: str = Field("auto", description="WIDTHxHEIGHT in pixels, or auto", max_length=20)
    quality: Quality = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    user: str | None = Field(None, max_length=200)
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=50)] = 0
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    style: Literal["vivid", "natural"] | None = None

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    negative_prompt: str = ""
    class_label: NonNegativeInt | None = None
    num_inference_steps: PositiveInt | None = None
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    scheduler: str | None = None
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    upscale_to: PositiveInt | None = Field(None, description="longer side in pixels")
    refresh_every: Annotated[int, Field(ge=1, le=10)] = Field(
        1, description="1: the whole U-Net in every step; k: its deep part in every k-th, which is faster"
    )

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str | None) -> str | None:
        if name is not None and name not in SCHEDULERS:
            raise ValueError(f"no scheduler {name!r}; allowed: {', '.join(SCHEDULERS)}")
        return name

    @model_validator(mode="after")
    def _within_limits(self, info: ValidationInfo) -> "GenerationRequest":
        limits: Limits = (info.context or {}).get("limits") or Limits()
        chars = max(len(self.prompt), len(self.negative_prompt))
        asked: list[tuple[str, float | None, float]] = [
            ("n", self.n, limits.max_images),
            ("num_inference_steps", self.num_inference_steps, limits.max_steps),
            ("guidance_scale", self.guidance_scale, limits.max_guidance),
            ("characters of a prompt", chars, limits.max_prompt_chars),
            ("upscale_to", self.upscale_to, limits.max_upscale_px),
            ("deadline_s", self.deadline_s, limits.max_deadline_s),
        ]
        for name, value, largest in asked:
            if value is not None and value > largest:
                raise ValueError(f"{name} {value:g} is too large; allowed: at most {largest:g}")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images come with stream=true only")
        _check_size(self.size_px, limits)
        return self

    @property
    def size_px(self) -> SizePx | None:
        """(height, width), or None for auto. ValueError for anything else."""
        if self.size == "auto":
            return None
        parts = self.size.split("x")
        if len(parts) != 2 or not all(part.isascii() and part.isdecimal() for part in parts):
            raise ValueError(f"size {self.size!r}; allowed: WIDTHxHEIGHT in pixels, or auto")
        width, height = map(int, parts)
        return height, width


def _check_size(size_px: SizePx | None, limits: Limits) -> None:
    if size_px is None:
        return
    multiple, most = limits.sizes_multiple_px, limits.max_side_px
    if any(side % multiple or not 0 < side <= most for side in size_px):
        height, width = size_px
        raise ValueError(f"size {width}x{height}; allowed: multiples of {multiple} from {multiple} to {most}")
