import pytest

from pipelines.serve.rates import Allowance, OverLimit, Rates


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _refused(rates: Rates, name: str = "alice") -> OverLimit:
    with pytest.raises(OverLimit) as over:
        rates.admit(name)
    return over.value


def test_a_minutes_worth_at_once_and_then_one_at_a_time() -> None:
    clock = Clock()
    rates = Rates({"alice": Allowance(6, 100)}, clock=clock)

    for _ in range(6):
        rates.admit("alice").release()
    assert (_refused(rates).limit, _refused(rates).retry_after_s) == ("rate", pytest.approx(10))

    clock.now_s += 4
    assert _refused(rates).retry_after_s == pytest.approx(6)
    clock.now_s += 6
    rates.admit("alice").release()
    assert _refused(rates).retry_after_s == pytest.approx(10)


def test_a_long_rest_saves_up_no_more_than_a_minute() -> None:
    clock = Clock()
    rates = Rates({"alice": Allowance(6, 100)}, clock=clock)

    clock.now_s += 1e6
    admitted = 0
    while admitted < 100:
        try:
            rates.admit("alice").release()
        except OverLimit:
            break
        admitted += 1
    assert admitted == 6


@pytest.mark.parametrize("requests_per_minute", [1, 7, 600, 100_000])
def test_who_waits_as_told_is_admitted(requests_per_minute: int) -> None:
    clock = Clock()
    rates = Rates({"alice": Allowance(requests_per_minute, 1)}, clock=clock)
    for _ in range(requests_per_minute):
        rates.admit("alice").release()

    for _ in range(50):
        clock.now_s += _refused(rates).retry_after_s + 1e-9
        rates.admit("alice").release()


def test_no_more_than_max_concurrent_and_a_refused_request_costs_nothing() -> None:
    rates = Rates({"alice": Allowance(4, 2)}, clock=Clock())
    first, second = rates.admit("alice"), rates.admit("alice")

    for _ in range(10):
        assert _refused(rates).limit == "concurrency"
    first.release()
    third = rates.admit("alice")
    second.release()
    with rates.admit("alice"):
        third.release()
    assert rates.active == {"alice": 0}
    assert _refused(rates).limit == "rate"


def test_a_slot_is_given_back_once() -> None:
    rates = Rates({"alice": Allowance(10, 2)}, clock=Clock())
    rates.admit("alice")

    with rates.admit("alice") as slot:
        slot.release()
        slot.release()
    slot.release()

    assert rates.active == {"alice": 1}


def test_a_failure_gives_the_slot_back() -> None:
    rates = Rates({"alice": Allowance(10, 1)}, clock=Clock())

    with pytest.raises(ZeroDivisionError), rates.admit("alice"):
        raise ZeroDivisionError
    assert rates.active == {"alice": 0}


def test_names_do_not_share() -> None:
    rates = Rates({"alice": Allowance(1, 1), "bob": Allowance(1, 1)}, clock=Clock())

    rates.admit("alice")
    rates.admit("bob")
    assert _refused(rates, "alice").limit == _refused(rates, "bob").limit == "concurrency"


def test_strangers_make_no_state() -> None:
    rates = Rates({"alice": Allowance(1, 1)}, clock=Clock())

    for stranger in range(100):
        with pytest.raises(KeyError):
            rates.admit(str(stranger))
    assert set(rates.active) == {"alice"}
