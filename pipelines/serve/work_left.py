"""Scaling by work: a stage has the replicas that its seconds of work left need, whatever requests those are.

A request of 10 steps and one of 100 are one request each, and so are a small and a large image: their number
says little about when they will be done. So each replica tells how long it will take for what it has, and
`WorkLeft` is the autoscaling policy of Ray Serve that reads it.
"""

import math
from collections import deque
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

__all__ = ["SECONDS_LEFT", "SECONDS_PER_REQUEST", "WorkLeft", "WorkMeter"]

# Keys of what a replica's ``record_autoscaling_stats`` returns.
SECONDS_LEFT = "seconds_left"
SECONDS_PER_REQUEST = "seconds_per_request"


class WorkLeft:
    """Policy: as many replicas as ``target_s`` of work each fill. Delays and bounds are Ray Serve's."""

    def __init__(self, target_s: float) -> None:
        self.target_s = target_s

    def __call__(self, context: "AutoscalingContext") -> tuple[float, dict[str, Any]]:
        latest = context.raw_metrics or {}
        left_s = sum(_latest(latest.get(SECONDS_LEFT)))
        per_request_s = _latest(latest.get(SECONDS_PER_REQUEST))
        waiting = context.total_queued_requests or 0.0
        # Whoever waits for a replica is work, too, of which nothing is known but what others took.
        total_s = left_s + waiting * (fmean(per_request_s) if per_request_s else self.target_s)
        return self.replicas(total_s), {}

    def replicas(self, total_s: float) -> int:
        return math.ceil(total_s / self.target_s)


def _latest(series_by_replica: Any) -> list[float]:
    """The newest value of every replica that has one."""
    return [float(series[-1].value) for series in (series_by_replica or {}).values() if series]


class WorkMeter:
    """Seconds of work in a replica that does one thing after the other, from how long such things took.

    Work is told in units that time is in proportion to: pixels, windows.
    """

    def __init__(self, seconds_per_unit: float) -> None:
        self._seconds_per_unit = seconds_per_unit
        self._units: dict[object, float] = {}
        self._sizes: deque[float] = deque(maxlen=32)

    def begin(self, units: float) -> object:
        """Work came; returns what to `end` it with."""
        work = object()
        self._units[work] = units
        self._sizes.append(units)
        return work

    def progress(self, work: object, units_left: float) -> None:
        self._units[work] = units_left

    def measured(self, units: float, seconds: float) -> None:
        """So much was done, in so many seconds."""
        self._seconds_per_unit += 0.3 * (seconds / units - self._seconds_per_unit)

    def end(self, work: object) -> None:
        del self._units[work]

    def stats(self) -> dict[str, float]:
        """For `WorkLeft`."""
        mean = fmean(self._sizes) if self._sizes else 0.0
        left_s = sum(self._units.values()) * self._seconds_per_unit
        return {SECONDS_LEFT: left_s, SECONDS_PER_REQUEST: mean * self._seconds_per_unit}
