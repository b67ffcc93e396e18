"""What a plan is made of: images, the latent dataset, devices and their rates, prices.

No price and no rate has a default. Bytes are decimal: 1 GB is 10⁹.
"""

from datetime import date
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pipelines.storage_form import StorageForm

__all__ = [
    "CpuRate",
    "DatasetPlan",
    "EmbeddingPlan",
    "EncodePlan",
    "Measurement",
    "PlanConfig",
    "Preemption",
    "Prices",
    "Rate",
    "Scaling",
    "StagePlan",
    "StoredRow",
    "TrainPlan",
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Measurement(_Part):
    """What makes a figure a measured one: the command that printed it, and the day."""

    command: str = Field(min_length=1)
    when: date


class Rate(_Part):
    """Images of one size that one device gets through; without ``measured`` it counts as given."""

    images_per_s: PositiveFloat
    size_px: PositiveInt = Field(description="side of the images that it was measured with")
    measured: Measurement | None = None


class CpuRate(_Part):
    """Images that one CPU reads, decodes and resizes, all sizes of the plan from one decode."""

    images_per_s: PositiveFloat
    measured: Measurement | None = None


class StoredRow(_Part):
    """Bytes of a row in its file: what `ldm stats` and `ldm bench encode` print, for this VAE and form."""

    num_bytes: PositiveFloat
    size_px: PositiveInt
    measured: Measurement | None = None


class EmbeddingPlan(_Part):
    """Text embeddings of every image's caption, fp16, before compression."""

    tokens: PositiveFloat = Field(description="of a caption, on average")
    width: PositiveInt = Field(description="features of a token")


class DatasetPlan(_Part):
    """What `ldm encode` is to write; docs/latent-dataset.md."""

    f: PositiveInt
    channels: PositiveInt
    sizes_px: tuple[PositiveInt, ...] = Field(min_length=1)
    form: StorageForm = StorageForm()
    unit_size: PositiveInt = 256
    text_bytes_per_row: int = Field(0, ge=0, description="key, caption and kept fields of a row")
    stored_row: StoredRow | None = None
    embedding: EmbeddingPlan | None = None
    source_bytes_per_image: PositiveFloat | None = Field(None, description="of an image in its shard")

    @model_validator(mode="after")
    def _check(self) -> "DatasetPlan":
        if len(set(self.sizes_px)) < len(self.sizes_px):
            raise ValueError("sizes_px names a size twice")
        for size_px in (*self.sizes_px, *([self.stored_row.size_px] if self.stored_row else [])):
            if size_px % self.f:
                raise ValueError(f"size {size_px} px; allowed: multiples of f, {self.f}")
        return self


class Scaling(_Part):
    """What each of several devices does, as a share of what it does alone."""

    efficiency: float = Field(gt=0, le=1)
    measured: Measurement | None = None


class Preemption(_Part):
    """How often the owner of the machines takes one away, and how long until another works in its place."""

    per_device_hour: NonNegativeFloat = Field(description="a node goes as a whole: the same for each device")
    restart_s: NonNegativeFloat


class StagePlan(_Part):
    """One stage on one kind of device; either how many there are, or by when it is to be done."""

    device: str = Field(min_length=1, description="what the rates are of, for people")
    rates: tuple[Rate, ...] = Field((), description="of one device; --rates adds measured ones")
    devices_per_node: PositiveInt
    devices: PositiveInt | None = None
    deadline_h: PositiveFloat | None = None
    max_devices: PositiveInt | None = Field(None, description="that a deadline may ask for")
    scaling: Scaling | None = Field(None, description="without it 0.9 is assumed")
    preemption: Preemption | None = Field(None, description="without it none")
    start_s: NonNegativeFloat | None = Field(None, description="until the devices work; not counted without")
    price_per_device_hour: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _check_devices(self) -> "StagePlan":
        if (self.devices is None) == (self.deadline_h is None):
            raise ValueError("give one of devices and deadline_h, and not both")
        if self.max_devices is not None and self.deadline_h is None:
            raise ValueError("max_devices is for a deadline; leave it out, or give deadline_h")
        if (self.devices or 0) % self.devices_per_node:
            raise ValueError(
                f"{self.devices} devices do not fill nodes of {self.devices_per_node}; allowed: a multiple"
            )
        if self.max_devices is not None and self.max_devices < self.devices_per_node:
            raise ValueError(f"max_devices {self.max_devices} is less than a node of {self.devices_per_node}")
        if len({rate.size_px for rate in self.rates}) < len(self.rates):
            raise ValueError("rates has a size twice")
        return self


class EncodePlan(StagePlan):
    """`ldm encode`: a rate is of inputs of one size, encoded once."""

    vae: str = Field(min_length=1, description="whose rates these are, as `ldm encode --vae` takes it")
    decode: CpuRate | None = None


class TrainPlan(StagePlan):
    """`ldm train`: a rate is of latents of images of one size."""

    preset: str = Field(min_length=1, description="whose rates these are, as `ldm train` takes it")
    size_px: PositiveInt
    steps: PositiveInt
    batch_size: PositiveInt = Field(description="latents per step over all devices")
    checkpoint_every: PositiveInt = Field(1000, description="steps that a kill loses at most")
    num_params: PositiveInt | None = Field(None, description="for the traffic of gradients between nodes")

    @model_validator(mode="after")
    def _check_batch(self) -> "TrainPlan":
        if self.batch_size % (self.devices or 1):
            raise ValueError(
                f"a batch of {self.batch_size} cannot be shared by {self.devices} devices evenly"
            )
        return self


class Prices(_Part):
    """Prices beside those of devices. Where one is missing the plan has no total."""

    currency: str = Field(min_length=1)
    gb_month: NonNegativeFloat | None = None
    storage_months: NonNegativeFloat | None = None
    gb_egress: NonNegativeFloat | None = None
    egress: tuple[Literal["images", "latents"], ...] | None = Field(
        None, description="what is read from where leaving costs: none of them ([]), images, latents"
    )


class PlanConfig(_Part):
    """A whole plan."""

    images: tuple[PositiveInt, ...] = Field(min_length=1, description="a column of the plan for each number")
    dataset: DatasetPlan
    encode: EncodePlan | None = None
    train: TrainPlan | None = None
    prices: Prices | None = None

    @model_validator(mode="after")
    def _check(self) -> "PlanConfig":
        if self.encode is None and self.train is None:
            raise ValueError("nothing to plan; give encode, train or both")
        if self.train and self.train.size_px not in self.dataset.sizes_px:
            sizes = ", ".join(map(str, self.dataset.sizes_px))
            raise ValueError(f"train.size_px is {self.train.size_px}; allowed: one of the dataset's, {sizes}")
        return self
