"""Costs on the meta device against closed forms."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from ldm.meta_cost import Cost, LiveBytes, count_params, meta_cost, weight_bytes

FLOAT = 4


def on_meta(module: nn.Module) -> nn.Module:
    return module.to("meta")


def test_a_linear_layer() -> None:
    layer = on_meta(nn.Linear(8, 16))
    made = (5 * 8 + 5 * 16) * FLOAT
    assert meta_cost(lambda: layer(torch.empty(5, 8))) == Cost(2 * 5 * 8 * 16, 0, made)
    assert count_params(layer) == 8 * 16 + 16
    assert weight_bytes(layer.half()) == (8 * 16 + 16) * 2


def test_a_convolution() -> None:
    layer = on_meta(nn.Conv2d(3, 7, 3, padding=1))
    cost = meta_cost(lambda: layer(torch.empty(2, 3, 10, 12)))
    assert cost == Cost(2 * 2 * 7 * 3 * 9 * 10 * 12, 0, 2 * 10 * 12 * (3 + 7) * FLOAT)


def test_attention_is_counted_and_its_scores_are_not_kept() -> None:
    batch, heads, positions, width = 2, 3, 2048, 16

    def attend() -> torch.Tensor:
        query = torch.empty(batch, heads, positions, width)
        return scaled_dot_product_attention(query, query, query)

    cost = meta_cost(attend)
    assert cost.flops == cost.attention_flops == 2 * 2 * batch * heads * positions**2 * width
    assert cost.activation_bytes < 3 * batch * heads * positions * width * FLOAT


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_is_alive_at_once(device: str) -> None:
    given = torch.ones(1000, device=device)
    with LiveBytes() as live:
        view = given[:500]
        assert live.live == 0  # its storage was there before
        a = view + 1
        b = a.view(10, 50).relu()
        assert live.live == 2 * 500 * FLOAT
        del a
        assert live.live == 500 * FLOAT
        b.add_(1)
        c = b[:, 0] * 2
        assert live.live == (500 + 10) * FLOAT
        del b, c
    assert (live.live, live.peak) == (0, 2 * 500 * FLOAT)
