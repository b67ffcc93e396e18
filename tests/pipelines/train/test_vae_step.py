"""A step of VAE training: bit-equal to plain AdamW, the GAN by hand, two ranks like one, frozen parts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.autoencoder import load
from ldm.discriminator import Discriminator
from ldm.ema import averaged, constant_decay
from ldm.perceptual import load_perceptual
from ldm.vae_loss import VaeLoss
from pipelines.train.adversary import Adversary
from pipelines.train.vae_state import trained_parts
from pipelines.train.vae_step import VaeOptimisation
from tests.pipelines.train.vae_ranks import step_on, steps_of


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def as_it_is(module: nn.Module) -> nn.Module:
    return module


def images(seed: int) -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def adversary(start_step: int = 1) -> Adversary:
    model = Discriminator(width=4)
    return Adversary(model, as_it_is, weight=0.5, learning_rate=1e-4, start_step=start_step)


def optimisation(loss: VaeLoss, game: Adversary | None = None) -> VaeOptimisation:
    return VaeOptimisation(
        loss, as_it_is, learning_rate=1e-3, lr_factor=lambda step: 0.5**step, clip_norm=0.01, adversary=game
    )


def test_without_the_new_terms_it_is_plain_adamw_bit_for_bit(vae_folder: Path) -> None:
    mine, theirs = (load(vae_folder).vae.requires_grad_(True) for _ in range(2))
    made = optimisation(VaeLoss(mine, "mse", 1e-3))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(3):
        torch.manual_seed(step)
        terms, norm = made.step(step + 1, images(step))
        torch.manual_seed(step)
        posterior = theirs.encode(images(step)).latent_dist
        reconstruction = nn.functional.mse_loss(theirs.decode(posterior.sample()).sample, images(step))
        kl = posterior.kl().mean() / (3 * 32 * 32)
        loss = reconstruction + 1e-3 * kl
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.5**step
        optimizer.zero_grad()
        loss.backward()
        assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 0.01))
        optimizer.step()
        assert list(terms) == ["loss", "reconstruction", "kl"]
        expected = torch.stack([loss, reconstruction, kl]).detach()
        assert torch.equal(torch.stack(list(terms.values())), expected)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_gan_term_is_weighted_by_the_ratio_of_gradients_at_the_last_layer(vae_folder: Path) -> None:
    vae = load(vae_folder).vae.requires_grad_(True)
    loss, game = VaeLoss(vae, "mse", 1e-3, load_perceptual("random"), 0.1), adversary()
    terms = loss(images(0))
    gan = game.term(terms, loss.last_layer)
    last = vae.decoder.conv_out.weight
    fidelity = terms.reconstruction + 0.1 * terms.perceptual
    (of_fidelity,) = torch.autograd.grad(fidelity, last, retain_graph=True)
    raw = -game.model(terms.decoded_B3HW).mean()
    (of_gan,) = torch.autograd.grad(raw, last, retain_graph=True)
    ratio = of_fidelity.square().sum().sqrt() / (of_gan.square().sum().sqrt() + 1e-6)
    assert 0 < float(ratio) < 1e4
    torch.testing.assert_close(gan.weight, 0.5 * ratio)
    torch.testing.assert_close(gan.gan, raw.detach())
    (got,) = torch.autograd.grad(gan.loss, last)
    torch.testing.assert_close(got, 0.5 * ratio * of_gan)


def test_generator_and_discriminator_each_get_their_own_gradients(vae_folder: Path) -> None:
    vae = load(vae_folder).vae.requires_grad_(True)
    loss, game = VaeLoss(vae, "mse", 0.0), adversary()
    terms = loss(images(0))
    game.term(terms, loss.last_layer).loss.backward(retain_graph=True)
    assert [p for p in game.model.parameters() if p.grad is not None] == []
    of_generator = [p.grad.clone() for p in vae.decoder.parameters()]
    # Not the last bias: its gradients from real and fake cancel while all logits are within the margin.
    weights = [p for p in game.model.parameters() if p.ndim == 4]
    before = [p.detach().clone() for p in weights]
    lost = game.update(images(0), terms.decoded_B3HW)
    assert all(torch.equal(p.grad, g) for p, g in zip(vae.decoder.parameters(), of_generator, strict=True))
    assert all(not torch.equal(p, old) for p, old in zip(weights, before, strict=True))
    assert game.update(images(0), terms.decoded_B3HW) < lost


def test_before_its_start_the_discriminator_changes_nothing(vae_folder: Path) -> None:
    vaes = [load(vae_folder).vae.requires_grad_(True) for _ in range(2)]
    game = adversary(start_step=3)
    at_rest = [p.detach().clone() for p in game.model.parameters()]
    plain, early = (
        optimisation(VaeLoss(vaes[0], "l1", 1e-3)),
        optimisation(VaeLoss(vaes[1], "l1", 1e-3), game),
    )
    for step in (1, 2):
        for each in (plain, early):
            torch.manual_seed(step)
            terms = each.step(step, images(step)).terms
    assert {n: float(terms[n]) for n in ("gan", "gan_weight", "discriminator")} == {
        "gan": 0.0, "gan_weight": 0.0, "discriminator": 0.0,
    }  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(*(v.parameters() for v in vaes), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(game.model.parameters(), at_rest, strict=True))
    terms = early.step(3, images(3)).terms
    assert list(terms) == ["loss", "reconstruction", "kl", "gan", "gan_weight", "discriminator"]
    assert float(terms["gan_weight"]) > 0 and float(terms["discriminator"]) > 0


def test_decoder_only_leaves_encoder_and_its_average_bit_equal(vae_folder: Path) -> None:
    start = load(vae_folder).vae
    vae = trained_parts(load(vae_folder).vae, "decoder")
    ema = averaged(vae, constant_decay(0.9))
    made = optimisation(VaeLoss(vae, "mse", 1e-3, load_perceptual("random"), 0.1), adversary())
    for step in (1, 2, 3):
        made.step(step, images(step))
        ema.update_parameters(vae)
    old, new, average = (m.state_dict() for m in (start, vae, ema.module))
    for name in old:
        changed = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(new[name], old[name]) is not changed, name
        assert torch.equal(average[name], old[name]) is not changed, name


def test_all_parts_are_trained_unless_told_otherwise(vae_folder: Path) -> None:
    vae = trained_parts(load(vae_folder).vae, "all")
    assert vae.training
    assert all(p.requires_grad for p in vae.parameters())


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_two_ranks_are_one_process_on_the_joined_batch(vae_folder: Path, tmp_path: Path) -> None:
    one = steps_of(str(vae_folder), 0, 1, as_it_is)
    two = step_on(2, tmp_path / "ddp", vae_folder)
    for rank in two:
        for name in ("vae1", "vae2", "vae3", "discriminator"):
            assert relative_error(rank[name], one[name]) < 1e-4, name
        assert torch.equal(rank["weights"], two[0]["weights"])
        torch.testing.assert_close(
            rank["terms2"]["gan_weight"], one["terms2"]["gan_weight"], rtol=1e-4, atol=0
        )
    assert relative_error(two[0]["terms1"]["loss"], two[1]["terms1"]["loss"]) > 1e-4


def test_two_ranks_drift_apart_where_the_call_bypasses_ddp(vae_folder: Path, tmp_path: Path) -> None:
    """The oracle above sees the fault: the unwrapped module called, so nothing is synchronised."""
    one = steps_of(str(vae_folder), 0, 1, as_it_is)
    two = step_on(2, tmp_path / "bypass", vae_folder, "bypass")
    assert not torch.equal(two[0]["weights"], two[1]["weights"])
    for rank in two:
        assert relative_error(rank["vae1"], one["vae1"]) > 0.05
