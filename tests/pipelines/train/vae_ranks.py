"""Ranks of a VAE training as plain processes, without Ray: what the DDP test starts."""

from pathlib import Path
from typing import Any

from tests.forked_ranks import run_ranks

__all__ = ["step_on", "steps_of"]


def step_on(world: int, folder: Path, vae: Path, how: str = "ddp") -> list[dict[str, Any]]:
    """What `steps_of` gives on each of ``world`` ranks. how: "ddp", or "bypass" for the fault."""
    import torch

    folder.mkdir()
    run_ranks(world, folder, _step, folder, vae, how)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(world)]


def steps_of(vae_folder: str, rank: int, world: int, wrap: Any) -> dict[str, Any]:
    """Three steps with every term on this rank's share of four images; gradients of step 1, weights after 3.

    The discriminator starts at step 2, whose gradients are kept as well.
    """
    import torch

    from ldm.autoencoder import load
    from ldm.discriminator import Discriminator
    from ldm.perceptual import load_perceptual
    from ldm.vae_loss import VaeLoss
    from pipelines.train.adversary import Adversary
    from pipelines.train.vae_step import VaeOptimisation

    torch.manual_seed(0)
    # In float64, so that what is left between one rank and two is the fault that is looked for.
    vae = torch.nn.Module.double(load(vae_folder).vae.train().requires_grad_(True))
    with torch.no_grad():
        # A narrow posterior: ranks draw other noise than one process does, and here it is nothing.
        vae.quant_conv.weight[3:] = 0.0
        vae.quant_conv.bias[3:] = -29.0
    discriminator = Discriminator(width=4).double()
    adversary = Adversary(discriminator, wrap, weight=0.5, learning_rate=1e-4, start_step=2)
    loss = VaeLoss(vae, "mse", 1e-3, load_perceptual("random"), 0.1)
    optimisation = VaeOptimisation(
        loss, wrap, learning_rate=1e-7, lr_factor=lambda _: 1.0, clip_norm=1e9, adversary=adversary
    )
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    found: dict[str, Any] = {}
    for step in (1, 2, 3):
        made = optimisation.step(step, images.chunk(world)[rank])
        found[f"terms{step}"] = made.terms
        found[f"vae{step}"] = torch.cat([p.grad.flatten() for p in vae.parameters()])
    found["discriminator"] = torch.cat([p.grad.flatten() for p in discriminator.parameters()])
    found["weights"] = torch.cat(
        [p.detach().flatten() for p in (*vae.parameters(), *discriminator.parameters())]
    )
    return found


def _step(rank: int, world: int, folder: Path, vae: Path, how: str) -> None:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    ddp = DistributedDataParallel
    wrap = ddp if how == "ddp" else lambda module: ddp(module).module
    torch.save(steps_of(str(vae), rank, world, wrap), folder / str(rank))
