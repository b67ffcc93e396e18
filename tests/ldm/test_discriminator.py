"""PatchGAN: its patches, hinge losses in closed form, the adaptive weight by hand."""

import pytest
import torch
from torch import nn

from ldm.discriminator import Discriminator, adaptive_weight, hinge_discriminator, hinge_generator
from ldm.errors import UserError


def images(size_px: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_hinge_losses_are_the_formula() -> None:
    real, fake = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([-3.0, 0.0, 2.0, 1.0])
    expected = 0.5 * ((3.0 + 0.5 + 0.0) / 3 + (0.0 + 1.0 + 3.0 + 2.0) / 4)
    assert float(hinge_discriminator(real, fake)) == pytest.approx(expected)
    assert float(hinge_generator(fake)) == 0.0
    assert float(hinge_generator(real)) == pytest.approx(-0.5)


def test_adaptive_weight_is_the_ratio_of_norms() -> None:
    fidelity, gan = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, -2.0]])
    assert float(adaptive_weight(fidelity, gan)) == pytest.approx(5.0 / 2.0, rel=1e-6)
    assert float(adaptive_weight(fidelity, 0 * gan)) == 1e4
    assert float(adaptive_weight(0 * fidelity, gan)) == 0.0


def test_adaptive_weight_carries_no_gradient() -> None:
    fidelity = torch.ones(2, requires_grad=True)
    assert not adaptive_weight(fidelity, torch.ones(2)).requires_grad


@pytest.mark.parametrize(("size_px", "side"), [(24, 1), (32, 2), (64, 6), (256, 30)])
def test_logits_are_of_patches(size_px: int, side: int) -> None:
    assert Discriminator(width=4)(images(size_px)).shape == (2, 1, side, side)


def test_a_patch_is_70_pixels() -> None:
    model = Discriminator(width=4)
    for index, layer in enumerate(model.layers):
        if isinstance(layer, nn.InstanceNorm2d):  # sees the whole image
            model.layers[index] = nn.Identity()
    seen = images(256, count=1).requires_grad_()
    model(seen)[0, 0, 15, 15].backward()
    assert seen.grad is not None
    rows = seen.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_a_logit_depends_on_its_image_alone() -> None:
    model, batch = Discriminator(width=4), images(32, count=3)
    torch.testing.assert_close(model(batch)[1:2], model(batch[1:2]))


def test_an_image_without_a_logit_is_refused() -> None:
    with pytest.raises(UserError, match=r"32×23 pixels is too small for the discriminator.*24 pixels"):
        Discriminator(width=4)(torch.zeros(1, 3, 23, 32))
