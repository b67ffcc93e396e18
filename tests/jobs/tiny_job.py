"""A job small enough to test the command's framework with."""

import math
from typing import Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig, Section
from ldm.errors import UserError


class Pool(Section):
    """Bounds of an actor pool."""

    min_size: int = Field(1, ge=1, description="fewest actors")
    max_size: int = Field(2, ge=1, description="most actors")

    @model_validator(mode="after")
    def _ordered(self) -> "Pool":
        if self.min_size > self.max_size:
            raise ValueError(f"min_size {self.min_size} is above max_size {self.max_size}")
        return self


class TinyJob(JobConfig):
    """Do next to nothing.

    A second paragraph of help.
    """

    input: CliPositionalArg[str] = Field(description="where to read")
    output: CliPositionalArg[str] = Field("there", description="where to write")
    batch_size: int = Field(8, gt=0, description="images per batch")
    store: Literal["moments", "mode"] = Field("moments", description="what is stored")
    limit: int | None = Field(None, description="stop after so many")
    flips: bool = Field(False, description="mirror at random")
    sizes: tuple[int, ...] = Field((64,), description="sizes in pixels")
    token: SecretStr | None = Field(None, description="a secret", min_length=4)
    pool: Pool = Field(Pool(min_size=2, max_size=3), description="the encoder's actors")
    end: Literal["done", "user error", "failure", "interrupt"] = Field("done", description="how to end")

    def run(self) -> dict[str, object]:
        match self.end:
            case "user error":
                raise UserError("no class 'owl'", allowed="cat, dog", do="choose one")
            case "failure":
                raise RuntimeError("out of luck\nand of memory")
            case "interrupt":
                raise KeyboardInterrupt
        return {"input": self.input, "batch_size": self.batch_size, "psnr_db": math.inf}
