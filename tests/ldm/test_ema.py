import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ldm.ema import averaged, constant_decay, power_decay


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(dtype)


def disturb(model: nn.Module, step: int) -> None:
    """About as far as a step of training moves weights of this size."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_decay_rule_is_that_of_diffusers(decay: float) -> None:
    reference = EMAModel(linear().parameters(), decay=decay)
    # diffusers counts the step that it is about to take, from 1.
    for num_updates in (1, 2, 10, 500, 10**6):
        assert constant_decay(decay)(num_updates) == reference.get_decay(num_updates + 1)


def test_the_decay_rises_to_its_cap() -> None:
    assert constant_decay(0.99)(0) == 0.1
    assert constant_decay(0.99)(8) == 0.5
    assert constant_decay(0.99)(10**9) == 0.99


def test_the_average_is_the_recursion_written_out() -> None:
    model = linear()
    ema = averaged(model, constant_decay(0.4))
    expected = None
    for step in range(12):
        disturb(model, step)
        ema.update_parameters(model)
        weight = model.weight.detach().double()
        # The first update takes the weights as they are; the random start counts for nothing.
        decay = min(0.4, (1 + step) / (10 + step))
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
        torch.testing.assert_close(ema.module.weight.double(), expected, rtol=0, atol=1e-6)
    assert not torch.equal(ema.module.weight, model.weight)


def test_the_average_is_that_of_diffusers() -> None:
    model = linear()
    ema, reference = averaged(model, constant_decay(0.9)), EMAModel(model.parameters(), decay=0.9)
    for step in range(100):
        disturb(model, step)
        ema.update_parameters(model)
        reference.step(model.parameters())
    for ours, theirs in zip(ema.module.parameters(), reference.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_average_is_a_copy_that_needs_no_gradients() -> None:
    model = linear()
    ema = averaged(model, constant_decay(0.9))
    disturb(model, 0)
    assert not torch.equal(ema.module.weight, model.weight)
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_small_steps_of_a_half_precision_model_are_not_lost() -> None:
    model = linear(torch.bfloat16)
    ema = averaged(model, constant_decay(0.999))
    nn.init.ones_(model.weight)
    ema.update_parameters(model)
    ema.n_averaged.fill_(100_000)
    nn.init.constant_(model.weight, 2.0)
    ema.update_parameters(model)
    assert ema.module.weight.dtype == torch.float32
    # In bfloat16, 1.001 would be rounded to 1.
    torch.testing.assert_close(ema.module.weight, torch.full((2, 3), 1.001))


def test_buffers_are_copied() -> None:
    model = nn.BatchNorm1d(2)
    ema = averaged(model, constant_decay(0.9))
    for level in (1.0, 2.0, 3.0):
        model.running_mean.fill_(level)
        ema.update_parameters(model)
        assert ema.module.running_mean.tolist() == [level, level]


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_a_power_average_has_the_width_asked_for(width: float) -> None:
    """The weights that n updates leave on the past have this spread, as a share of n."""
    decay, total = power_decay(width), 4000
    weights = torch.zeros(total, dtype=torch.float64)
    for step in range(total):
        kept = decay(step) if step else 0.0
        weights *= kept
        weights[step] = 1 - kept
    at = (torch.arange(total, dtype=torch.float64) + 1) / total
    mean = (weights * at).sum()
    assert float(weights.sum()) == pytest.approx(1)
    assert float((weights * (at - mean) ** 2).sum().sqrt()) == pytest.approx(width, rel=0.01)
