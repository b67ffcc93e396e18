"""How an image is cut for its VAE."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

__all__ = ["Tiling"]


class Tiling(BaseModel):
    """Mode and bounds of a tiled encode or decode."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["exact", "fast", "whole"] = Field(
        "fast",
        description="exact: the whole network's result, layer by layer over maps in host memory; "
        "fast: GroupNorm statistics from a small copy of the image; whole: in one call",
    )
    tile: PositiveInt = Field(32, description="side of a tile, in latents")
    coarse: PositiveInt = Field(
        128, description="of mode fast: largest side, in latents, of the copy that statistics are taken from"
    )
    spill: Path | None = Field(None, description="folder for maps that host memory has no room for")
