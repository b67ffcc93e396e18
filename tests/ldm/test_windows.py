"""Windows cover every canvas, and the mean of what agrees is exactly that."""

import numpy as np
import pytest
import torch

from ldm.windows import WindowGrid, WindowMean


def grids() -> list[WindowGrid]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(60):
        multiple = int(rng.integers(1, 5))
        sides = multiple * rng.integers(1, 13, 4)
        canvas, largest = (int(sides[0]), int(sides[1])), (int(sides[2]), int(sides[3]))
        made.append(WindowGrid.of(canvas, largest, float(rng.choice([0, 0.1, 0.25, 0.5, 0.9])), multiple))
    return made


@pytest.mark.parametrize("grid", grids())
def test_every_place_is_covered_wherever_the_grid_begins(grid: WindowGrid) -> None:
    height, width = grid.window_hw
    for seed in range(8):
        corners = grid.corners(np.random.default_rng(seed))
        covered = np.zeros(grid.canvas_HW, int)
        for top, left in corners:
            assert (top % grid.multiple, left % grid.multiple) == (0, 0)
            assert 0 <= top <= grid.canvas_HW[0] - height and 0 <= left <= grid.canvas_HW[1] - width
            covered[top : top + height, left : left + width] += 1
        assert covered.min() >= 1
        assert len(set(corners)) == len(corners)


def test_corners_of_a_grid() -> None:
    """10 rows in windows of 4 with stride 3: the grid begins at 0, 1 or 2, and its ends are moved inside."""
    grid = WindowGrid.of((10, 4), (4, 4), 0.25, 1)
    by_row = {tuple(row for row, _ in grid.corners(np.random.default_rng(seed))) for seed in range(30)}
    assert by_row == {(0, 3, 6), (0, 1, 4, 6), (0, 2, 5, 6)}


def test_one_window_where_the_canvas_is_no_larger() -> None:
    grid = WindowGrid.of((6, 8), (8, 8), 0.5, 2)
    assert [grid.corners(np.random.default_rng(seed)) for seed in range(5)] == [[(0, 0)]] * 5


def test_weights_fall_to_one_over_the_overlap() -> None:
    weights = WindowGrid.of((60, 60), (8, 6), 0.5, 1).weights_hw()
    rows, columns = torch.tensor([1, 2, 3, 4, 4, 3, 2, 1]), torch.tensor([1, 2, 3, 3, 2, 1])
    assert torch.equal(weights, (rows[:, None] * columns).double())
    assert WindowGrid.of((60, 60), (8, 6), 0.0, 1).weights_hw().unique().tolist() == [1]


def test_the_mean_is_weighted() -> None:
    """Two windows of 4 that share 2 lines, one says 0 and the other 1."""
    grid = WindowGrid((1, 6), (1, 4), (1, 2), 1)
    mean = WindowMean(1, grid)
    mean.add((0, 0), torch.zeros(1, 1, 4))
    mean.add((0, 2), torch.ones(1, 1, 4))
    third = np.float32(1 / 3)
    assert grid.weights_hw().tolist() == [[1, 2, 2, 1]]
    # Where the first window has weights 2, 1 the second has 1, 2.
    np.testing.assert_array_equal(mean.result()[0, 0], [0, 0, third, np.float32(2 / 3), 1, 1])


@pytest.mark.parametrize("grid", grids()[:20])
def test_predictions_that_agree_keep_their_bits(grid: WindowGrid) -> None:
    prediction = torch.randn(3, *grid.canvas_HW, generator=torch.Generator().manual_seed(0)) * 1e3
    height, width = grid.window_hw
    mean = WindowMean(3, grid)
    for top, left in grid.corners(np.random.default_rng(1)):
        mean.add((top, left), prediction[:, top : top + height, left : left + width])
    assert torch.equal(mean.result(), prediction)


def test_a_place_without_a_window() -> None:
    mean = WindowMean(1, WindowGrid((1, 6), (1, 4), (1, 2), 1))
    mean.add((0, 0), torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="do not cover"):
        mean.result()


@pytest.mark.parametrize(
    ("canvas", "largest", "overlap", "multiple"),
    [((7, 8), (4, 4), 0.0, 2), ((8, 8), (4, 3), 0.0, 2), ((8, 8), (4, 4), 1.0, 2), ((0, 8), (4, 4), 0.0, 2)],
)
def test_what_is_no_grid(
    canvas: tuple[int, int], largest: tuple[int, int], overlap: float, multiple: int
) -> None:
    with pytest.raises(ValueError, match="windows"):
        WindowGrid.of(canvas, largest, overlap, multiple)
