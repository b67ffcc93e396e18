"""One optimisation step of VAE training, generator first and then discriminator, without Ray."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.vae_loss import VaeLoss
from pipelines.train.adversary import Adversary, GanTerm, Wrap

__all__ = ["Step", "VaeOptimisation"]


class Step(NamedTuple):
    """Scalars of a step: the terms to log, and the gradient's norm before clipping."""

    terms: dict[str, Tensor]
    gradient_norm: Tensor


class VaeOptimisation:
    """A VAE's loss with its optimiser, schedule and, where there is one, adversary.

    Every forward pass goes through ``wrap(loss)``: that is DDP where there are several workers, which
    adds up the gradients of what is called through it and of nothing else.
    """

    def __init__(
        self,
        loss: VaeLoss,
        wrap: Wrap,
        *,
        learning_rate: float,
        lr_factor: Callable[[int], float],
        clip_norm: float,
        adversary: Adversary | None = None,
    ) -> None:
        """Trains the parameters that require gradients. lr_factor: of the step, counted from 0."""
        self.loss, self.adversary, self.clip_norm = loss, adversary, clip_norm
        self.learning_rate, self.lr_factor = learning_rate, lr_factor
        self.model = wrap(loss)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )

    def step(self, step: int, images_B3HW: Tensor) -> Step:
        """Update on a batch of images in [-1, 1] on the model's device; ``step`` counts from 1."""
        terms = self.model(images_B3HW)
        loss = terms.loss
        values = {"loss": loss, "reconstruction": terms.reconstruction, "kl": terms.kl}
        if self.loss.perceptual is not None:
            values["perceptual"] = terms.perceptual
        if self.adversary is not None:
            playing = self.adversary.active(step)
            gan = self.adversary.term(terms, self.loss.last_layer) if playing else _no_term(loss)
            loss = loss + gan.loss
            values |= {"loss": loss, "gan": gan.gan, "gan_weight": gan.weight}
        norm = self._descend(loss, self.learning_rate * self.lr_factor(step - 1))
        if self.adversary is not None:
            decoded = terms.decoded_B3HW
            lost = self.adversary.update(images_B3HW, decoded) if playing else loss.new_zeros(())
            values["discriminator"] = lost
        return Step({name: value.detach() for name, value in values.items()}, norm)

    def _descend(self, loss: Tensor, learning_rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        # No stubs for backward.
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        return norm


def _no_term(like: Tensor) -> GanTerm:
    zero = like.new_zeros(())
    return GanTerm(zero, zero, zero)
