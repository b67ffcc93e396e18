"""The parts that need no cluster, as small as they can be: that they run and say what they are to say."""

import math

import pytest

from jobs.bench.serve_load import Arrival, Outcome, offer, poisson, quantile
from jobs.bench_serve import BenchServeJob


@pytest.mark.faults_long
def test_the_engine_part_has_its_figures() -> None:
    found = BenchServeJob(only=("engine", "reuse"), preset="tiny", side=4, rounds=1, cancels=8).run()
    assert found["cancelled"] == 8 and found["cancel_leaks"] == 0 and found["cancel_harmed"] == 0
    assert isinstance(found["cancel_extra_steps"], float) and found["cancel_extra_steps"] <= 2
    assert {"engine_efficiency", "preview_cost", "first_preview", "reuse_gain"} <= found.keys()


@pytest.mark.faults_long
def test_deadlines_are_compared() -> None:
    found = BenchServeJob(only=("deadlines",), preset="tiny", side=4, seeds=1, seconds=0.5).run()
    assert {"deadline_gain", "overload_goodput"} <= found.keys()


def test_a_load_is_that_of_its_seed_and_as_dense_as_its_rate() -> None:
    arrivals = poisson(50.0, 100.0, {10: 1.0, 50: 3.0}, seed=1)
    assert arrivals == poisson(50.0, 100.0, {10: 1.0, 50: 3.0}, seed=1) != poisson(50.0, 100.0, {10: 1.0}, 2)
    # Five standard deviations of the count, and of the share of long ones.
    assert abs(len(arrivals) - 5000) < 5 * math.sqrt(5000)
    long = sum(arrival.num_steps == 50 for arrival in arrivals) / len(arrivals)
    assert abs(long - 0.75) < 5 * math.sqrt(0.75 * 0.25 / len(arrivals))


async def _refuses_the_odd(arrival: Arrival) -> bool:
    if arrival.seed == 3:
        import asyncio

        await asyncio.sleep(60)
    return arrival.seed % 2 == 1


def test_who_is_not_done_is_late_for_ever() -> None:
    import asyncio

    arrivals = [Arrival(0.001 * seed, 10, seed) for seed in range(4)]
    outcomes = asyncio.run(offer(_refuses_the_odd, arrivals, patience_s=0.2))
    assert [outcome.refused for outcome in outcomes] == [False, True, False, False]
    assert [outcome.latency_s == math.inf for outcome in outcomes] == [False, False, False, True]
    assert isinstance(outcomes[0], Outcome)


def test_a_quantile_is_one_of_the_values() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert quantile(list(map(float, range(1, 101))), 0.99) == 99.0
