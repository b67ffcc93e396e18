"""The seam measure on pictures whose steps are known."""

import numpy as np
import pytest

from ldm.seams import seam_ratio


def ramp(step: float, border: int, jump: float) -> np.ndarray:
    """(24, 24, 2): rises by ``step`` from row to row, by ``jump`` across ``border``."""
    rows = np.arange(24) * step
    rows[border:] += jump - step
    return np.broadcast_to(rows[:, None, None], (24, 24, 2))


def test_planted_step() -> None:
    assert seam_ratio(ramp(2.0, 8, 7.0), rows=[8]) == 3.5
    assert seam_ratio(ramp(2.0, 8, 7.0).swapaxes(0, 1), columns=[8]) == 3.5


def test_a_step_elsewhere_is_no_seam() -> None:
    assert seam_ratio(ramp(2.0, 20, 7.0), rows=[8]) == 1.0
    # One of the eight steps beside the border: 2 ÷ mean(7 × 2, 7).
    assert seam_ratio(ramp(2.0, 10, 7.0), rows=[8]) == 2.0 / (21.0 / 8)


def test_rows_and_columns_count_by_their_steps() -> None:
    image = ramp(2.0, 8, 7.0) + ramp(1.0, 12, 1.0).swapaxes(0, 1)
    assert seam_ratio(image, rows=[8], columns=[12]) == ((7 + 1) / 2) / ((2 + 1) / 2)
    # Beside the two rows lie 4 … 16 without 8 and 12, beside the column 8 … 16 without 12.
    expected = ((7 + 2 + 1) / 3) / ((2 * 11 + 1 * 8) / 19)
    assert seam_ratio(image, rows=[8, 12], columns=[12]) == pytest.approx(expected, rel=1e-12)


def test_whole_numbers_do_not_wrap() -> None:
    image = ramp(-2.0, 8, -7.0).astype(np.int16) + 100
    assert seam_ratio(image.astype(np.uint8), rows=[8]) == 3.5


def test_nothing_or_only_a_border() -> None:
    assert seam_ratio(ramp(0.0, 8, 0.0), rows=[8], columns=[5]) == 1.0
    assert seam_ratio(ramp(0.0, 8, 3.0), rows=[8]) == np.inf


def test_noise_has_no_seam() -> None:
    noise = np.random.default_rng(0).normal(size=(256, 256, 3))
    assert seam_ratio(noise, range(32, 256, 32), range(32, 256, 32)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("borders", [[], [0], [24], [*range(1, 24)]])
def test_what_has_no_measure(borders: list[int]) -> None:
    with pytest.raises(ValueError, match="border"):
        seam_ratio(ramp(1.0, 8, 1.0), rows=borders)
