"""A figure of a plan, and where it comes from."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Figure", "Origin", "exact_or_extrapolated"]

Origin = Literal["measured", "given", "assumed", "extrapolated"]


@dataclass(frozen=True)
class Figure:
    """value, in ``unit`` (none for a pure number), and how far it can be trusted.

    measured      by a command that the note names, on the device of the plan
    given         by the author of the plan, or exact arithmetic on nothing else
    assumed       by this program, since nobody gave or measured it; the note says so
    extrapolated  computed from any of the others for a size, a number or a time that nobody measured
    """

    value: float
    unit: str
    origin: Origin
    note: str = ""


def exact_or_extrapolated(*origins: Origin) -> Origin:
    """Of a figure computed from others: exact arithmetic on what was given stays ``given``."""
    return "given" if all(origin == "given" for origin in origins) else "extrapolated"
