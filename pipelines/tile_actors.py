"""How many actors share the decoding of one image, and what each is given."""

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

__all__ = ["TileActors"]


class TileActors(BaseModel):
    """Actors that share an image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: NonNegativeInt = Field(0, description="actors that share the image; 0: this process, without Ray")
    num_cpus: PositiveFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
    threads: PositiveInt | None = Field(None, description="torch threads per actor; default: Ray's choice")
