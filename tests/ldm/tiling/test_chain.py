import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ldm.tiling.chain import ConvStep
from ldm.tiling.spans import Rect, Span

SIZE = (5, 7)
WANTED = [Span(0, 10), Span(0, 1), Span(1, 2), Span(3, 8), Span(4, 7), Span(7, 10), Span(9, 10)]


@pytest.mark.parametrize("rows", WANTED)
@pytest.mark.parametrize("columns", [*WANTED, Span(0, 14), Span(11, 14)])
def test_doubling_gives_any_rectangle_of_the_convolution_of_the_upsampled_map(
    rows: Span, columns: Span
) -> None:
    torch.manual_seed(0)
    conv, map_1CHW = nn.Conv2d(3, 4, 3, padding=1).double(), torch.randn(1, 3, *SIZE).double()
    step = ConvStep(conv, (1, 1), doubles=True)
    have = Rect(step.needs(rows, SIZE[0]), step.needs(columns, SIZE[1]))
    part = map_1CHW[..., have.rows.start : have.rows.stop, have.columns.start : have.columns.stop]

    found = step.run(part, have, Rect(rows, columns), SIZE, None)

    whole = conv(F.interpolate(map_1CHW, scale_factor=2.0, mode="nearest"))
    expected = whole[..., rows.start : rows.stop, columns.start : columns.stop]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
