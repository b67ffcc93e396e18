"""Functions take turns in this process, one call each, so that all meet the same machine."""

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

__all__ = ["MIN_ROUNDS", "median_seconds"]

MIN_ROUNDS = 3


def median_seconds(ways: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median duration of a call of each, after one call each that warms up.

    seconds: of each way; `MIN_ROUNDS` calls at least.
    """
    for call in ways.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in ways}
    rounds, end = 0, perf_counter() + seconds * len(ways)
    while rounds < MIN_ROUNDS or perf_counter() < end:
        for name, call in ways.items():
            begin = perf_counter()
            call()
            found[name].append(perf_counter() - begin)
        rounds += 1
    return {name: median(durations) for name, durations in found.items()}
