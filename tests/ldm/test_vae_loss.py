"""The loss of a VAE: each term by its formula, and that every term reaches the weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.autoencoder import load
from ldm.perceptual import Perceptual, load_perceptual
from ldm.vae_loss import VaeLoss


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def perceptual() -> Perceptual:
    return load_perceptual("random")


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_loss_is_the_formula(vae_folder: Path, images: Tensor, perceptual: Perceptual, loss: str) -> None:
    vae = load(vae_folder).vae
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        got = VaeLoss(vae, loss, 0.25, perceptual, 0.5)(images)
        torch.manual_seed(1)
        plain = VaeLoss(vae, loss, 0.25)(images)
        torch.manual_seed(1)
        posterior = vae.encode(images).latent_dist
        mean, var = posterior.mean, posterior.std.square()
        decoded = vae.decode(mean + posterior.std * torch.randn(mean.shape)).sample
    error = decoded - images
    reconstruction = error.abs().mean() if loss == "l1" else error.square().mean()
    kl = 0.5 * (mean.square() + var - 1 - var.log()).sum() / images.numel()
    distance = perceptual(decoded, images).mean()
    torch.testing.assert_close(got.decoded_B3HW, decoded)
    torch.testing.assert_close(got.reconstruction, reconstruction)
    torch.testing.assert_close(got.kl, kl)
    torch.testing.assert_close(got.perceptual, distance)
    torch.testing.assert_close(got.fidelity, reconstruction + 0.5 * distance)
    torch.testing.assert_close(got.loss, reconstruction + 0.5 * distance + 0.25 * kl)
    torch.testing.assert_close(plain.loss, reconstruction + 0.25 * kl)
    assert float(plain.perceptual) == 0.0


def test_perceptual_gradient_reaches_the_decoder(
    vae_folder: Path, images: Tensor, perceptual: Perceptual
) -> None:
    """Fails where the distance is computed under no_grad, or of detached images."""
    vae = load(vae_folder).vae.requires_grad_(True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        terms = VaeLoss(vae, "mse", 0.0, perceptual, 1.0)(images)
        weights = list(vae.decoder.parameters())
        got = torch.autograd.grad(terms.perceptual, weights)
        torch.manual_seed(1)
        decoded = vae.decode(vae.encode(images).latent_dist.sample()).sample
    a, b = decoded, images
    distance = torch.zeros(())
    for index in range(len(perceptual.stages)):
        if index == 0:
            shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
            a, b = ((x - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for x in (a, b))
        a, b = perceptual.stages[index](a), perceptual.stages[index](b)
        unit_a, unit_b = (x / torch.sqrt(1e-8 + (x**2).sum(1, keepdim=True)) for x in (a, b))
        weighted = perceptual.heads[index].view(1, -1, 1, 1) * (unit_a - unit_b) ** 2
        distance = distance + weighted.sum(1).mean()
    expected = torch.autograd.grad(distance, weights)
    assert all(gradient.any() for gradient in got)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_loss_goes_through_the_modules_own_forward_pass(
    vae_folder: Path, images: Tensor, perceptual: Perceptual
) -> None:
    """What DDP hooks into: a call of the one module gives gradients to all that is trained, and only that."""
    module = VaeLoss(load(vae_folder).vae.requires_grad_(True), "mse", 1e-3, perceptual, 0.1)
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module(images).loss.backward()
    assert calls == ["forward"]
    reached = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {f"vae.{name}" for name, _ in module.vae.named_parameters()}


def test_last_layer_is_the_decoders(vae_folder: Path, images: Tensor) -> None:
    module = VaeLoss(load(vae_folder).vae.requires_grad_(True), "mse", 1e-3)
    decoded = module(images).decoded_B3HW
    (gradient,) = torch.autograd.grad(decoded.sum(), module.last_layer)
    assert gradient.shape == (3, 8, 3, 3)
    assert gradient.any()
