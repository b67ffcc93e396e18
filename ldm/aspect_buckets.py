"""Aspect-ratio buckets: the few shapes that pictures of any aspect are brought to."""

from fractions import Fraction
from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

__all__ = ["AspectBuckets", "Shape"]

Shape = tuple[int, int]  # (height, width) in pixels


class AspectBuckets(BaseModel):
    """Shapes of at most the area of a square of the size, their sides multiples of ``step_px``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step_px: PositiveInt = Field(64, description="sides are multiples of it, at the smallest size")
    max_aspect: float = Field(2.0, ge=1, allow_inf_nan=False, description="longer side ÷ shorter side")

    def shapes(self, size_px: int) -> tuple[Shape, ...]:
        """All shapes for a size, from the widest to the highest; none where ``step_px`` is too large.

        A shape counts if no side of it could grow by a step within the area size_px².
        """
        return _shapes(size_px, self.step_px, self.max_aspect)

    def nearest(self, height: int, width: int, size_px: int) -> Shape:
        """The shape whose log aspect is nearest; of two as near the larger one, then the wider."""
        aspect = Fraction(width, height)

        def rank(shape: Shape) -> tuple[Fraction, int, int]:
            ratio = aspect * shape[0] / shape[1]  # exact: a tie is one on every machine
            return max(ratio, 1 / ratio), -shape[0] * shape[1], -shape[1]

        return min(self.shapes(size_px), key=rank)


@lru_cache(maxsize=64)
def _shapes(size_px: int, step_px: int, max_aspect: float) -> tuple[Shape, ...]:
    def longest(side: int) -> int:
        return size_px**2 // side // step_px * step_px

    sides = range(step_px, size_px**2 // step_px + 1, step_px)
    full = ((side, longest(side)) for side in sides if longest(side) and longest(longest(side)) == side)
    return tuple(shape for shape in full if max(shape) <= max_aspect * min(shape))
