"""The order of training: every row once an epoch, whoever reads it, from wherever it goes on."""

from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest

from pipelines.train.order import BucketOrder, default_lanes, epoch_schedule

SIZES = np.array([7, 1, 12, 12, 12, 3, 12, 5, 12])
HELD = np.array([1, 0, 0, 2, 0, 3, 0, 0, 1])


def order_of(batch_size: int = 8, lanes: int = 4, window_groups: int = 2, seed: int = 0) -> BucketOrder:
    return BucketOrder(
        "b", HELD, SIZES, batch_size=batch_size, lanes=lanes, window_groups=window_groups, seed=seed
    )


def lane_rows(order: BucketOrder, epoch: int, lane: int, first: int = 0) -> list[tuple[int, int]]:
    """(row group, row) from the lane's row ``first`` on."""
    rows: list[tuple[int, int]] = []
    for window in order.windows(epoch, lane, first):
        line = [(span.group, row) for span in window.spans for row in range(span.start, span.stop)]
        rows += [line[at] for at in window.order_N][max(0, first - window.first) :]
    return rows


@pytest.mark.parametrize(("lanes", "window_groups"), list(product([1, 2, 4, 8], [1, 2, 100])))
def test_an_epoch_has_every_trained_row_once(lanes: int, window_groups: int) -> None:
    order = order_of(lanes=lanes, window_groups=window_groups)
    rows = [row for lane in range(lanes) for row in lane_rows(order, 3, lane)]
    trained = {(g, row) for g in range(len(SIZES)) for row in range(HELD[g], SIZES[g])}
    assert len(set(rows)) == len(rows)
    assert set(rows) <= trained
    # Lanes are of one length: fewer rows than there are lanes are left out.
    assert len(trained) - len(rows) == order.num_rows % lanes
    assert order.num_batches == order.num_rows // 8


@pytest.mark.parametrize("lane", [0, 1, 3])
def test_a_lane_goes_on_from_any_row(lane: int) -> None:
    order = order_of()
    whole = lane_rows(order, 1, lane)
    assert len(whole) == order.num_rows // 4
    for first in range(len(whole)):
        assert lane_rows(order, 1, lane, first) == whole[first:]


def test_epochs_seeds_and_lanes_differ() -> None:
    orders = [tuple(lane_rows(order_of(seed=seed), epoch, 0)) for seed, epoch in product(range(3), range(3))]
    assert len(set(orders)) == len(orders)


def test_rows_are_shuffled_beyond_their_group() -> None:
    groups = [group for group, _ in lane_rows(order_of(lanes=1, window_groups=4), 0, 0)]
    runs = 1 + sum(a != b for a, b in pairwise(groups))
    assert runs > 2 * len(set(groups))


def test_a_window_holds_no_more_groups_than_asked_for() -> None:
    windows = [window for lane in range(4) for window in order_of().windows(0, lane)]
    assert max(len(window.spans) for window in windows) == 2


@pytest.mark.parametrize(("batch_size", "lanes"), [(64, 8), (12, 4), (6, 2), (7, 1)])
def test_default_lanes(batch_size: int, lanes: int) -> None:
    assert default_lanes(batch_size) == lanes


def test_lanes_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="a batch of 8 has no equal share of 3 lanes"):
        order_of(lanes=3)


def test_a_schedule_has_every_batch_of_every_bucket_in_its_order() -> None:
    counts = {"wide": 5, "tall": 3, "square": 9}
    schedule = epoch_schedule(counts, seed=0, epoch=0)
    assert Counter(name for name, _ in schedule) == counts
    for name, count in counts.items():
        assert [index for bucket, index in schedule if bucket == name] == list(range(count))
    assert schedule != epoch_schedule(counts, seed=0, epoch=1)
    assert schedule != sorted(schedule)
