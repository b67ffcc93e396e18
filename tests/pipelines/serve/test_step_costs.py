import pytest

from pipelines.serve.step_costs import LatentShape, StepCosts

SHAPE = (4, 8, 8)


def _costs(seconds_by_rows: dict[int, float], max_rows: int = 16) -> StepCosts:
    costs = StepCosts(lambda _, rows: seconds_by_rows[rows], max_rows)
    costs.calibrate(SHAPE)
    return costs


def test_batches_are_large_where_rows_are_nearly_free() -> None:
    assert _costs({1: 0.010, 2: 0.0102, 4: 0.0106, 8: 0.0112, 16: 0.012}).best_rows(SHAPE) == 16


def test_there_are_no_batches_where_time_grows_with_the_rows() -> None:
    assert _costs({1: 0.100, 2: 0.198, 4: 0.390, 8: 0.78, 16: 1.55}).best_rows(SHAPE) == 1


def test_the_batch_ends_where_more_rows_save_too_little() -> None:
    assert _costs({1: 0.010, 2: 0.011, 4: 0.013, 8: 0.0255, 16: 0.0505}).best_rows(SHAPE) == 4


def test_measuring_ends_where_a_row_becomes_dearer() -> None:
    asked = []

    def measure(_: object, rows: int) -> float:
        asked.append(rows)
        return {1: 0.10, 2: 0.18, 4: 0.40}[rows]

    costs = StepCosts(measure, 64)
    costs.calibrate(SHAPE)
    costs.calibrate(SHAPE)

    assert asked == [1, 2, 4]


def test_seconds_between_and_beyond_measured_rows() -> None:
    costs = _costs({1: 0.10, 2: 0.12, 4: 0.18}, max_rows=4)

    assert [costs.seconds(SHAPE, rows) for rows in (1, 3, 8)] == pytest.approx([0.10, 0.15, 0.36])


def test_a_machine_that_slows_down_is_noticed() -> None:
    costs = _costs({1: 1.0}, max_rows=1)

    for _ in range(60):
        costs.observe(SHAPE, 1, 3.0)

    assert costs.seconds(SHAPE, 1) == pytest.approx(3.0, rel=0.01)


def test_what_a_call_takes_at_its_best_is_not_forgotten_when_the_machine_slows_down() -> None:
    costs = _costs({1: 1.0}, max_rows=1)
    for seconds in (0.5, 2.0):
        for _ in range(60):
            costs.observe(SHAPE, 1, seconds)

    assert costs.best_seconds(SHAPE, 1) == pytest.approx(0.5, rel=0.01)
    assert costs.seconds(SHAPE, 1) == pytest.approx(2.0, rel=0.01)


def test_a_call_that_keeps_the_device_busy_by_itself_is_measured_once_and_has_no_company() -> None:
    asked: list[int] = []

    def measure(_: LatentShape, rows: int) -> float:
        asked.append(rows)
        return 0.6 * rows

    costs = StepCosts(measure, max_rows=32)
    costs.calibrate(SHAPE)
    assert asked == [1] and costs.best_rows(SHAPE) == 1
    assert costs.seconds(SHAPE, 2) == pytest.approx(1.2)


def test_rows_within_a_time() -> None:
    costs = _costs({1: 0.010, 2: 0.012, 4: 0.016, 8: 0.024, 16: 0.040})
    assert [costs.rows_within(SHAPE, seconds) for seconds in (0.009, 0.010, 0.0161, 0.024, 1.0)] == [
        0,
        1,
        4,
        8,
        16,
    ]
