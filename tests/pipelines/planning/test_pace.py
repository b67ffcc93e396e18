"""Hours of a stage by hand, and the fewest nodes for a deadline against trying every number."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from pipelines.planning.pace import Interruptions, Pace, fewest_nodes

# 4 devices at half of 100 images/s each: 200 images/s, 720,000 images in an hour.
PACE = Pace(images=720_000, images_per_s=100, devices_per_node=2, efficiency=0.5)
# Of each device-hour three times 500 images at 50 images/s, and 50 s: 180 of 3600 s.
ENCODING = Interruptions(per_device_hour=3, restart_s=50, images=500, stops_all=False)
# On two nodes six times an hour 2,000 images at 200 images/s, and 50 s: 360 of 3600 s.
TRAINING = Interruptions(per_device_hour=3, restart_s=50, images=2000, stops_all=True)


def paces() -> list[Pace]:
    lost = [
        None,
        *(Interruptions(p, 30, 64, stops_all=stops) for p in (0.01, 2, 40) for stops in (True, False)),
    ]
    grid = itertools.product((1000, 10**7), (0.5, 33.8), (1, 8), (0.3, 0.9, 1.0), (0.0, 900.0), lost)
    return [Pace(*values) for values in grid]


def test_an_hour() -> None:
    assert PACE.images_per_s_of(2) == 200
    assert (PACE.lost_share(2), PACE.hours(2), PACE.device_hours(2)) == (0, 1, 4)
    assert replace(PACE, start_s=900).hours(2) == 1.25


def test_a_device_alone_has_no_loss_by_scaling() -> None:
    alone = replace(PACE, devices_per_node=1)
    assert (alone.hours(1), alone.hours(2)) == (2, 2)


def test_a_lost_encoder_costs_its_own_work() -> None:
    pace = replace(PACE, interruptions=ENCODING)
    assert pace.lost_share(2) == pace.lost_share(7) == pytest.approx(0.05)
    assert pace.hours(2) == pytest.approx(1 / 0.95)


def test_a_lost_node_stops_the_whole_training() -> None:
    pace = replace(PACE, interruptions=TRAINING)
    assert pace.lost_share(2) == pytest.approx(0.1)
    assert pace.hours(2) == pytest.approx(1 / 0.9)
    # With more nodes the work done again takes less time, but there are more that can be lost.
    assert pace.lost_share(4) == pytest.approx(12 * (5 + 50) / 3600)


def test_no_progress_takes_for_ever() -> None:
    assert replace(PACE, interruptions=replace(ENCODING, per_device_hour=60)).hours(2) == math.inf


def test_no_image_is_lost_or_made() -> None:
    """device-hours × rate × efficiency × (1 − lost) = images."""
    for pace, nodes in itertools.product(paces(), (1, 2, 64)):
        if pace.hours(nodes) == math.inf:
            continue
        devices = nodes * pace.devices_per_node
        at_work_s = 3600 * pace.device_hours(nodes) - devices * pace.start_s
        efficiency = 1 if devices == 1 else pace.efficiency
        made = at_work_s * pace.images_per_s * efficiency * (1 - pace.lost_share(nodes))
        assert made == pytest.approx(pace.images, rel=1e-9)


def test_what_makes_a_stage_slower_or_faster() -> None:
    for pace in paces():
        hours = pace.hours(4)
        assert replace(pace, images=2 * pace.images).hours(4) >= hours
        assert replace(pace, images_per_s=2 * pace.images_per_s).hours(4) <= hours
        assert replace(pace, efficiency=pace.efficiency / 2).hours(4) >= hours
        if pace.interruptions:
            worse = replace(pace.interruptions, per_device_hour=2 * pace.interruptions.per_device_hour)
            assert replace(pace, interruptions=worse).hours(4) >= hours
            assert replace(pace, interruptions=None).hours(4) <= hours
        if not (pace.interruptions and pace.interruptions.stops_all):
            assert pace.hours(5) <= hours


def test_fewest_nodes_are_those_found_by_trying_all() -> None:
    rng, found = random.Random(0), set()
    for pace in paces():
        if pace.interruptions and pace.interruptions.stops_all:
            continue
        for _ in range(5):
            deadline_h = pace.images / pace.images_per_s / 3600 / pace.devices_per_node / rng.uniform(0.1, 60)
            tried = next((nodes for nodes in range(1, 101) if pace.hours(nodes) <= deadline_h), None)
            assert fewest_nodes(pace, deadline_h, 100) == tried
            found.add(tried)
    assert {None, 1} < found and len(found) > 20
