from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.serve.work_left import SECONDS_LEFT, SECONDS_PER_REQUEST, WorkLeft, WorkMeter


def _context(replicas: Mapping[str, Mapping[str, float]], waiting: float = 0.0) -> Any:
    """As Ray Serve gives it: the metrics of each replica as series, of which the last value counts."""
    names = (SECONDS_LEFT, SECONDS_PER_REQUEST)
    series = {
        name: {
            replica: [SimpleNamespace(value=99.0), SimpleNamespace(value=values[name])]
            for replica, values in replicas.items()
        }
        for name in names
    }
    return SimpleNamespace(raw_metrics=series, total_queued_requests=waiting)


def _replica(left_s: float, per_request_s: float = 2.0) -> dict[str, float]:
    return {SECONDS_LEFT: left_s, SECONDS_PER_REQUEST: per_request_s}


@pytest.mark.parametrize(("left", "replicas"), [((0.0,), 0), ((1.0,), 1), ((10.0,), 1), ((10.1, 15.0), 3)])
def test_as_many_replicas_as_the_work_fills(left: tuple[float, ...], replicas: int) -> None:
    context = _context({str(index): _replica(seconds) for index, seconds in enumerate(left)})
    assert WorkLeft(target_s=10.0)(context)[0] == replicas


def test_whoever_waits_for_a_replica_is_work_of_the_size_that_others_were() -> None:
    assert WorkLeft(10.0)(_context({"a": _replica(5.0, per_request_s=2.0)}, waiting=10))[0] == 3


def test_without_a_replica_who_waits_is_worth_one_each() -> None:
    assert WorkLeft(10.0)(_context({}, waiting=2))[0] == 2
    assert WorkLeft(10.0)(SimpleNamespace(raw_metrics=None, total_queued_requests=None))[0] == 0  # type: ignore[arg-type]


def test_a_meter_learns_how_long_a_unit_takes() -> None:
    meter = WorkMeter(seconds_per_unit=1.0)
    work = meter.begin(10)
    assert meter.stats() == {SECONDS_LEFT: 10.0, SECONDS_PER_REQUEST: 10.0}
    for _ in range(50):
        meter.measured(10, 5.0)
    meter.progress(work, 4)
    assert meter.stats()[SECONDS_LEFT] == pytest.approx(2.0, rel=1e-3)
    meter.end(work)
    assert meter.stats()[SECONDS_LEFT] == 0
