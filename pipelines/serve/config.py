"""What a server serves, with what, and for whom: one frozen model, as ``ldm serve`` and Ray Serve take it."""

from pathlib import Path

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from ldm.tiling.config import Tiling
from pipelines.custom_resources import CustomResources
from pipelines.serve.generation_request import Limits
from pipelines.serve.guard import AccessConfig

__all__ = [
    "JobsConfig",
    "ModelSource",
    "SamplerPool",
    "ServeConfig",
    "ServeOptions",
    "StagePool",
    "UpsamplerStage",
]


class ModelSource(BaseModel):
    """Where a model is: as `ldm.model_card.read_card` takes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path = Field(description="a checkpoint of ldm train, or a diffusers folder")
    vae: str | None = Field(None, description="default: the model's own")
    lora: Path | None = Field(None, description="folder of an adapter to put onto it")


class StagePool(BaseModel):
    """Replicas of one stage, what each is given, and when there are to be more or fewer.

    A stage has as many replicas as its work left, in seconds, fills for ``target_s`` each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: NonNegativeInt = Field(1, description="0: none, when there is nothing to do")
    max_replicas: PositiveInt = 1
    num_cpus: NonNegativeFloat = 1.0
    num_gpus: NonNegativeFloat = Field(0.0, description="GPUs of each; fractions share one")
    resources: CustomResources = {}
    threads: PositiveInt | None = Field(None, description="torch threads of each; default: Ray's choice")
    target_s: PositiveFloat = Field(10.0, description="seconds of work for each replica")
    upscale_delay_s: NonNegativeFloat = 1.0
    downscale_delay_s: NonNegativeFloat = 60.0
    max_ongoing: PositiveInt = Field(64, description="requests in one replica; others wait for one")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "StagePool":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}"
            )
        return self


class SamplerPool(StagePool):
    """Of the sampler, whose replicas batch."""

    max_rows: PositiveInt = Field(32, description="of a U-Net call; fewer, where more do not pay")
    max_slowdown: PositiveFloat | None = Field(
        None, description="refuse whoever would take longer than so many times what it takes alone"
    )
    max_models: PositiveInt = Field(2, description="models that a replica holds; the one used last stays")


class UpsamplerStage(StagePool):
    """One upsampler and its replicas."""

    checkpoint: Path = Field(description="of an upsampler, from ldm train")
    steps: PositiveInt = 25
    window_batch: PositiveInt = Field(8, description="windows in one call of the U-Net")
    window_overlap: float = Field(0.25, ge=0, lt=1, description="least share of a window's side")


class JobsConfig(BaseModel):
    """Where long jobs are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field("out/serve/jobs", description="folder or s3://…, which all stages reach")
    keep_s: PositiveFloat = Field(86_400.0, description="results are removed so long after they are done")
    max_unfinished: PositiveInt = Field(100, description="jobs of all keys that are not done")
    max_unfinished_per_key: PositiveInt = 20
    at_once: PositiveInt = Field(2, description="jobs that run at the same time")


class ServeOptions(BaseModel):
    """All of a server but its models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    upsamplers: tuple[UpsamplerStage, ...] = Field((), description="the cascade, in its order")

    ingress: StagePool = StagePool(num_cpus=0.5, max_ongoing=1000)
    conditioner: StagePool = StagePool(num_cpus=0.5)
    sampler: SamplerPool = SamplerPool()
    decoder: StagePool = StagePool()

    tiling: Tiling = Tiling(mode="fast")
    whole_up_to_px: PositiveInt = Field(1024, description="longer side of images that are decoded in one go")
    default_steps: PositiveInt = 25
    default_guidance: NonNegativeFloat = 3.0
    default_upscale_noise: NonNegativeInt = Field(0, description="noise_level of the upsamplers")
    cache_bytes: NonNegativeInt = Field(64 * 2**20, description="of finished images, in each ingress")
    keep_alive_s: PositiveFloat = Field(10.0, description="between two signs of life in a stream")
    request_timeout_s: PositiveFloat = Field(600.0, description="longer requests end with 504")
    limits: Limits = Limits()
    access: AccessConfig = AccessConfig()
    jobs: JobsConfig = JobsConfig()
    log_prompts: bool = Field(False, description="write prompts into the log")


class ServeConfig(ServeOptions):
    """All of a server. The first model is the default one."""

    models: dict[str, ModelSource] = Field(min_length=1)
