"""The discriminator's side of VAE training: its term in the generator's loss, and its own update."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from ldm.discriminator import Discriminator, adaptive_weight, hinge_discriminator, hinge_generator
from ldm.vae_loss import VaeTerms

__all__ = ["Adversary", "GanTerm", "Wrap"]

Wrap = Callable[[nn.Module], nn.Module]


class GanTerm(NamedTuple):
    """``loss`` to add to the generator's = λ · ``weight`` · ``gan``; ``weight`` holds λ; scalars."""

    loss: Tensor
    gan: Tensor
    weight: Tensor


class Adversary:
    """A discriminator with its optimiser, the same on every worker, from ``start_step`` on.

    weight: of the GAN term, beside the adaptive λ. wrap: puts a module on its device and, where there
    are several workers, into DDP.
    """

    def __init__(
        self, model: Discriminator, wrap: Wrap, *, weight: float, learning_rate: float, start_step: int
    ) -> None:
        self.weight, self.start_step = weight, start_step
        self.model = model
        self.synchronised = wrap(model)
        # Momentum of 0.9 would carry gradients of a decoder that has moved on (betas of Esser et al.'s code).
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.5, 0.9))

    def active(self, step: int) -> bool:
        """Whether ``step``, counted from 1, is at or after the start."""
        return step >= self.start_step

    def term(self, terms: VaeTerms, last_layer: Tensor) -> GanTerm:
        """The GAN term of a decoded batch; λ of all workers' gradients together."""
        # Here the discriminator is a frozen function. Through its DDP wrapper it would wait for
        # gradients that never come, and with gradients on it would collect the generator's in its own.
        self.model.requires_grad_(False)
        gan = hinge_generator(self.model(terms.decoded_B3HW))
        self.model.requires_grad_(True)
        gradients = torch.stack([_gradient(terms.fidelity, last_layer), _gradient(gan, last_layer)])
        factor = self.weight * adaptive_weight(*mean_over_workers(gradients))
        return GanTerm(factor * gan, gan.detach(), factor)

    def update(self, real_B3HW: Tensor, fake_B3HW: Tensor) -> Tensor:
        """One step of the discriminator; its loss, a scalar. No gradient goes into ``fake_B3HW``."""
        # One pass for both halves: DDP expects one backward pass for each forward pass.
        logits = self.synchronised(torch.cat([real_B3HW, fake_B3HW.detach()]))
        loss = hinge_discriminator(*logits.chunk(2))
        self.optimizer.zero_grad(set_to_none=True)
        # No stubs for backward.
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


def mean_over_workers(value: Tensor) -> Tensor:
    """Mean of each element over the processes of torch.distributed; as it is where there is one."""
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(value)  # a sum: gloo has no mean
        value = value / distributed.get_world_size()
    return value


def _gradient(loss: Tensor, weight: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    return gradient
