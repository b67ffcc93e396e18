"""The progress line, its clock, and the stop at a loss that is no number."""

import math
from collections.abc import Callable

import pytest

from ldm.errors import LdmError
from pipelines.train.progress import DivergedError, Progress, clock, stop_on_nan


@pytest.fixture
def at_second(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""

    def set_time(seconds: float) -> None:
        monkeypatch.setattr("time.monotonic", lambda: seconds)

    set_time(1000.0)
    return set_time


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3599.4, "59:59"), (3700, "1:01:40"), (90_000, "25:00:00")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_rates_are_since_the_last_call_and_the_time_left_by_the_mean(
    at_second: Callable[[float], None],
) -> None:
    progress = Progress("train", num_steps=100, batch_size=8)
    at_second(1010.0)
    assert progress.rates(20) == {"steps_per_s": 2, "images_per_s": 16, "elapsed_s": 10, "left_s": 40}
    at_second(1020.0)
    assert progress.rates(25) == {"steps_per_s": 0.5, "images_per_s": 4, "elapsed_s": 20, "left_s": 60}


def test_line_says_where_the_run_is(
    at_second: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("train", num_steps=100, batch_size=8)
    at_second(1010.0)
    assert progress.line(20, {"step": 20, "loss": 0.25})["left_s"] == 40
    assert capsys.readouterr().out == "train 20/100  2.00 steps/s  16 images/s  loss 0.2500  0:40 left\n"


def test_other_ranks_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert Progress("train", 10, 2, quiet=True).line(1, {"loss": 1.0}).keys() >= {"steps_per_s", "left_s"}
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_stop_on_nan_names_metric_and_step(value: float) -> None:
    with pytest.raises(DivergedError, match=rf"^gradient_norm is {value} at step 300; lower the learning"):
        stop_on_nan({"step": 300, "loss": 1.0, "gradient_norm": value})
    assert issubclass(DivergedError, LdmError)


def test_finite_metrics_pass() -> None:
    stop_on_nan({"step": 1, "loss": 1e38, "gradient_norm": 0.0})
