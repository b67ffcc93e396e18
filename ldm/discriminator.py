"""PatchGAN: a discriminator of overlapping patches, its hinge losses, and the weight of its term."""

import torch
from torch import Tensor, nn

from ldm.errors import UserError

__all__ = ["Discriminator", "adaptive_weight", "hinge_discriminator", "hinge_generator"]


class Discriminator(nn.Module):
    """PatchGAN of Isola et al. 2017 (section 3.2.2, appendix 6.1.2): one logit per 70×70 px patch.

    Normalised per image, as Isola et al. do with their batches of one, and not per batch: so a logit
    depends on its image alone, and several workers compute what one would on the joined batch.

    width: channels of the first layer; the logits' side is (image side)/8 - 2, rounded down.
    """

    min_px = 24

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            *_normalised(width, 2 * width, stride=2),
            *_normalised(2 * width, 4 * width, stride=2),
            *_normalised(4 * width, 8 * width, stride=1),
            nn.Conv2d(8 * width, 1, 4, padding=1),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits (B, 1, h, w), above 0 for real; images float in [-1, 1]. UserError below ``min_px``."""
        self.check_size(*images_B3HW.shape[-2:])
        logits: Tensor = self.layers(images_B3HW)
        return logits

    @classmethod
    def check_size(cls, height: int, width: int) -> None:
        """UserError where an image of ``height`` × ``width`` px leaves no logit."""
        if min(height, width) < cls.min_px:
            raise UserError(
                f"an image of {width}×{height} pixels is too small for the discriminator",
                allowed=f"sides of {cls.min_px} pixels or more",
            )


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """½ (E[max(0, 1 - D(x))] + E[max(0, 1 + D(x̂))]), a scalar (Lim & Ye 2017); logits of any shape.

    The half is that of the latent diffusion paper's code.
    """
    return 0.5 * (nn.functional.relu(1 - real).mean() + nn.functional.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """-E[D(x̂)], a scalar; logits of any shape."""
    return -fake.mean()


def adaptive_weight(fidelity_gradient: Tensor, gan_gradient: Tensor) -> Tensor:
    """λ = ‖∇L_rec‖ / (‖∇L_GAN‖ + 10⁻⁶), clamped to [0, 10⁴]: a scalar without gradient.

    Both gradients are those at the weight of the decoder's last layer (Esser et al. 2021, eq. 7; the
    bound is that of their code). The GAN term then moves that layer as much as fidelity does.
    """
    ratio = fidelity_gradient.norm() / (gan_gradient.norm() + 1e-6)
    return torch.clamp(ratio, 0.0, 1e4).detach()


def _normalised(channels: int, width: int, *, stride: int) -> tuple[nn.Module, ...]:
    # The normalisation takes the mean away, so a bias would do nothing.
    convolution = nn.Conv2d(channels, width, 4, stride=stride, padding=1, bias=False)
    return convolution, nn.InstanceNorm2d(width, affine=True), nn.LeakyReLU(0.2)
