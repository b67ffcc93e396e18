"""Ranks of a VAE training as plain processes with gloo, without Ray: what the DDP test starts.

usage: vae_ranks.py RANK WORLD RENDEZVOUS OUT VAE HOW   (HOW: "ddp", or "bypass" for the fault)
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["step_on", "steps_of"]

ROOT = Path(__file__).parents[3]


def step_on(world: int, folder: Path, vae: Path, how: str = "ddp") -> list[dict[str, Any]]:
    """What `steps_of` gives on each of ``world`` ranks."""
    import torch

    folder.mkdir()
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), f"{folder}/meet", f"{folder}/{rank}", vae, how],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
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


def main(rank: str, world: str, meet: str, out: str, vae: str, how: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=int(rank), world_size=int(world))
    ddp = DistributedDataParallel
    torch.save(steps_of(vae, int(rank), int(world), ddp if how == "ddp" else lambda m: ddp(m).module), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
