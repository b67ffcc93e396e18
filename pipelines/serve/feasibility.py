"""Whether requests end in time, if the one that is due first is always served first."""

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Load", "finish_times", "harms"]


class Load(NamedTuple):
    """A request: when it is ``due``, which orders it; its ``deadline``, infinite where it has none; and
    ``seconds`` of steps that it still needs in a full batch."""

    due: float
    deadline: float
    seconds: float


def finish_times(loads: Iterable[Load], now: float, lanes: int) -> list[float]:
    """When each of ``loads`` ends, if ``lanes`` of them share a batch and the first due goes first.

    A list schedule: steps of a request follow one another, so it cannot use two lanes.
    """
    ordered = sorted(enumerate(loads), key=lambda item: item[1].due)
    free = [now] * lanes
    ends = [0.0] * len(ordered)
    for index, load in ordered:
        ends[index] = heapq.heappop(free) + load.seconds
        heapq.heappush(free, ends[index])
    return ends


def harms(new: Load, accepted: Sequence[Load], now: float, lanes: int) -> bool:
    """Whether ``new`` would miss its deadline, or an ``accepted`` one because of it."""
    *after, own = finish_times([*accepted, new], now, lanes)
    if own > new.deadline:
        return True
    late = [index for index, load in enumerate(accepted) if after[index] > load.deadline]
    if not late:
        return False
    before = finish_times(accepted, now, lanes)
    return any(before[index] <= accepted[index].deadline for index in late)
