from math import inf

from pipelines.serve.feasibility import Load, finish_times, harms


def test_who_is_due_first_goes_first_in_two_lanes() -> None:
    loads = [Load(9, inf, 4), Load(1, inf, 3), Load(2, inf, 1)]

    assert finish_times(loads, now=10, lanes=2) == [15, 13, 11]


def test_a_request_that_would_be_late_does_harm() -> None:
    accepted = [Load(5, 5, 4)]

    assert not harms(Load(8, 8, 4), accepted, now=0, lanes=1)
    assert harms(Load(7, 7, 4), accepted, now=0, lanes=1)
    assert not harms(Load(7, 7, 4), accepted, now=0, lanes=2)


def test_a_request_that_would_make_another_late_does_harm() -> None:
    accepted = [Load(5, 5, 4)]

    assert harms(Load(3, 3, 2), accepted, now=0, lanes=1)
    assert not harms(Load(3, 3, 1), accepted, now=0, lanes=1)


def test_who_is_late_anyway_and_who_has_no_deadline_keeps_nobody_out() -> None:
    accepted = [Load(5, 5, 40), Load(6, inf, 4)]

    assert not harms(Load(3, 3, 2), accepted, now=0, lanes=1)
