"""Progress from unit reports, on a clock that the test turns."""

import io
import json

import pytest

from jobs.encode_view import encode_view, text_of
from pipelines.encode.progress import WINDOW_REPORTS, EncodeProgress
from pipelines.encode.report import UnitReport


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def report(pid: int = 1, rows: int = 10, *, is_final: bool = False, encode_s: float = 2.0) -> UnitReport:
    return UnitReport(
        unit="u",
        shard="s",
        is_final=is_final,
        inputs=rows + 1,
        rows=rows,
        images=2 * rows,
        bytes=1000,
        quarantined={"no_image": 1},
        examples=("s#1: no_image",),
        decode_s=0.5,
        node="n",
        pid=pid,
        device="cpu",
        encode_started_at=0.0,
        encode_s=encode_s,
    )


def test_rates_estimate_and_busy_shares() -> None:
    clock = Clock()
    progress = EncodeProgress(4, clock)
    assert progress.snapshot().rows_left is None
    for pid in (1, 2):
        clock.now_s += 2.0
        progress.add(report(pid, is_final=pid == 2))
    now = progress.snapshot()
    assert (now.elapsed_s, now.units, now.rows, now.shards_done) == (4.0, 2, 20, 1)
    # 40 images in 4 s; one of four shards took 20 rows, and 4 s, so three more take 60 rows and 12 s.
    assert (now.images_per_s_now, now.images_per_s_mean) == (10.0, 10.0)
    assert (now.rows_left, now.left_s) == (60.0, 12.0)
    # Two encoders worked 2 s each of 4 s; decoding took 1 s of 4.
    assert (now.encoders, now.encoders_busy_share, now.decoders_busy) == (2, 0.5, 0.25)
    assert (now.quarantined, now.bytes) == ({"no_image": 2}, 2000)
    assert "20 of about 80 images, shard 1 of 4, 10.0 images/s now" in text_of(now)
    assert "0:00:12 left" in text_of(now) and "2 no_image" in text_of(now)


def test_now_is_the_last_seconds_and_memory_is_bounded() -> None:
    clock = Clock()
    progress = EncodeProgress(2, clock)
    for _ in range(3 * WINDOW_REPORTS):
        progress.add(report())
    assert len(progress._recent) == WINDOW_REPORTS
    clock.now_s += 1000
    now = progress.snapshot()
    assert (now.images_per_s_now, now.encoders, now.encoders_busy_share) == (0.0, 0, 0.0)
    assert now.images_per_s_mean == pytest.approx(3 * WINDOW_REPORTS * 20 / 1000)


def test_elsewhere_than_on_a_terminal_there_are_json_lines() -> None:
    stream = io.StringIO()
    with encode_view(1, stream) as watch:
        watch(report(is_final=True))
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["rows"] == 10 and json.loads(line)["rows_left"] == 0


def test_nothing_to_do_shows_nothing() -> None:
    stream = io.StringIO()
    with encode_view(0, stream):
        pass
    assert stream.getvalue() == ""
