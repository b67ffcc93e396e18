"""Resources of ENCODE's stages, as a job's config states them. Imports neither torch nor ray."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, model_validator

from pipelines.custom_resources import CustomResources

__all__ = ["ActorPool", "EncoderPool", "TaskPool", "TextPool"]


class _Pool(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    num_cpus: NonNegativeFloat = Field(1.0, description="CPUs of each worker")
    resources: CustomResources = {}


class TaskPool(_Pool):
    """A stage of Ray tasks."""

    max_size: PositiveInt | None = Field(None, description="most tasks at once; without it as many as fit")


class ActorPool(_Pool):
    """A stage of Ray actors; the pool grows from min_size to max_size while its queue is long."""

    num_gpus: NonNegativeFloat = Field(0.0, description="GPUs of each worker; fractions share one")
    accelerator_type: str | None = Field(None, description="kind of GPU, as Ray names it: L4, A10G, H100 …")
    min_size: PositiveInt = Field(1, description="actors that start with the job")
    max_size: PositiveInt = Field(1, description="most actors")

    @model_validator(mode="after")
    def _sizes_in_order(self) -> "ActorPool":
        if self.max_size < self.min_size:
            raise ValueError(f"max_size {self.max_size} is below min_size {self.min_size}")
        return self


class EncoderPool(ActorPool):
    """The VAE actors. What is said of their arithmetic changes speed and last bits, not the result."""

    micro_batch: PositiveInt = Field(
        16, description="images in one call of the VAE; an actor that runs out of memory halves it for good"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the arithmetic (autocast); what overflows is done again in fp32"
    )
    channels_last: bool = Field(True, description="memory layout of the VAE's weights and activations")
    compile: bool = Field(False, description="torch.compile the VAE's encoder: pays after minutes")


class TextPool(ActorPool):
    """The text encoder's actors."""

    micro_batch: PositiveInt = Field(32, description="captions of one length in one call of the text encoder")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of weights and arithmetic")
