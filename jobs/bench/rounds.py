"""Functions timed in turns in one process."""

import time
from collections.abc import Callable, Mapping
from statistics import median

__all__ = ["median_seconds"]


def median_seconds(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median of ``rounds`` of each way, every other round backwards; a round before those is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name in list(ways) if index % 2 == 0 else reversed(list(ways)):
            start = time.perf_counter()
            ways[name]()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in seconds.items()}
