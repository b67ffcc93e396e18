"""What a U-Net call costs, by latent shape and rows: measured, never assumed.

Batching pays where a call of many rows takes hardly longer than one of a single row, and it does not where
the time grows with the rows: then it only makes the short wait for the long. Which of both holds depends on
the latent's size, the model and the machine.
"""

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeAlias

from ldm.sampling import Trajectory

__all__ = ["LatentShape", "StepCosts", "timed"]

LatentShape: TypeAlias = tuple[int, int, int]

# A larger batch has to save this share of the time of a row, or it is not worth the wait.
WORTH = 0.05
# A call this long keeps the device busy by itself: more rows would take longer in proportion, and so would
# measuring them.
LONG_S = 0.5
# Weight of the newest call in what is known of a shape's speed now.
NEWEST = 0.1


@dataclass
class _Shape:
    """Seconds by rows, ascending, at calibration; ``drift``: seconds now over those; its least."""

    rows: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    drift: float = 1.0
    least_drift: float = 1.0

    @cached_property
    def best_rows(self) -> int:
        per_row = [seconds / rows for rows, seconds in zip(self.rows, self.seconds, strict=True)]
        worth = min(per_row) * (1 + WORTH)
        return next(rows for rows, cost in zip(self.rows, per_row, strict=True) if cost <= worth)

    def calibrated(self, rows: int) -> float:
        """Interpolated between the measured rows, and beyond them in proportion to the rows."""
        index = bisect_left(self.rows, rows)
        if index == len(self.rows):
            return self.seconds[-1] * rows / self.rows[-1]
        if self.rows[index] == rows or index == 0:
            return self.seconds[index]
        (low, high), (fast, slow) = self.rows[index - 1 : index + 1], self.seconds[index - 1 : index + 1]
        return fast + (slow - fast) * (rows - low) / (high - low)


class StepCosts:
    """Seconds of a call with some rows of latents of one shape.

    measure: (shape, rows) → seconds of such a call; asked for 1, 2, 4, … rows of a shape up to ``max_rows``,
    and no further than more rows pay, or a call takes longer than ``long_s``.
    """

    def __init__(
        self, measure: Callable[[LatentShape, int], float], max_rows: int, long_s: float = LONG_S
    ) -> None:
        self._measure, self.max_rows, self._long_s = measure, max_rows, long_s
        self._shapes: dict[LatentShape, _Shape] = {}

    def knows(self, shape: LatentShape) -> bool:
        return shape in self._shapes

    def calibrate(self, shape: LatentShape) -> None:
        """Measure a shape that is not known; takes some calls."""
        if self.knows(shape):
            return
        found, rows = _Shape(), 1
        while rows <= self.max_rows:
            found.rows.append(rows)
            found.seconds.append(self._measure(shape, rows))
            if found.seconds[-1] > self._long_s:
                break
            if len(found.rows) > 1 and found.seconds[-1] / rows > found.seconds[-2] / found.rows[-2]:
                break
            rows *= 2
        self._shapes[shape] = found

    def observe(self, shape: LatentShape, rows: int, seconds: float) -> None:
        """Take account of a call, since a machine's speed changes."""
        known = self._shapes[shape]
        known.drift += NEWEST * (seconds / known.calibrated(rows) - known.drift)
        known.least_drift = min(known.least_drift, known.drift)

    def seconds(self, shape: LatentShape, rows: int) -> float:
        """Expected of a call."""
        known = self._shapes[shape]
        return known.calibrated(rows) * known.drift

    def best_seconds(self, shape: LatentShape, rows: int) -> float:
        """Of a call when nothing else slows the machine down."""
        known = self._shapes[shape]
        return known.calibrated(rows) * known.least_drift

    def rows_within(self, shape: LatentShape, seconds: float) -> int:
        """The most rows, up to ``max_rows``, of a call that takes no longer; 0 where none does."""
        return bisect_right(range(1, self.max_rows + 1), seconds, key=partial(self.seconds, shape))

    def best_rows(self, shape: LatentShape) -> int:
        """The fewest rows at which a row costs hardly more than in the best batch."""
        return self._shapes[shape].best_rows


def timed(
    step: Callable[[Sequence[Trajectory]], None], make: Callable[[LatentShape], Trajectory], calls: int = 3
) -> Callable[[LatentShape, int], float]:
    """What `StepCosts` measures with: the fastest of ``calls`` of ``step``, after one that warms up.

    What else runs only adds to it, and at the start of a server much does. One has to do where it takes long,
    since requests wait meanwhile.

    make: an unguided trajectory of at least so many steps and one more.
    """

    def measure(shape: LatentShape, rows: int) -> float:
        trajectories = [make(shape) for _ in range(rows)]
        _seconds(step, trajectories)
        found = [_seconds(step, trajectories)]
        while len(found) < calls and found[0] <= LONG_S:
            found.append(_seconds(step, trajectories))
        return min(found)

    return measure


def _seconds(step: Callable[[Sequence[Trajectory]], None], trajectories: Sequence[Trajectory]) -> float:
    start = time.perf_counter()
    step(trajectories)
    return time.perf_counter() - start
