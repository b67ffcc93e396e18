"""What a VAE is trained to make small: reconstruction + perceptual distance + KL of the posterior."""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from ldm.perceptual import Perceptual

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["VaeLoss", "VaeTerms"]


class VaeTerms(NamedTuple):
    """The terms of one batch, scalars, and the decoded images (B, 3, H, W).

    ``fidelity`` is reconstruction + weight · perceptual, ``loss`` that + weight · kl; ``kl`` is
    KL(q(z|x) ‖ N(0, 1)) in nats per pixel value.
    """

    loss: Tensor
    fidelity: Tensor
    reconstruction: Tensor
    perceptual: Tensor
    kl: Tensor
    decoded_B3HW: Tensor


class VaeLoss(nn.Module):
    """Loss of a VAE as one module, so that its forward pass goes through DDP, which hooks into it.

    As in the latent diffusion paper (Rombach et al. 2022, appendix G), without the adversarial term:
    that needs a second model with its own optimiser, and only the decoded images from here.
    """

    def __init__(
        self,
        vae: "AutoencoderKL",
        loss: str,
        kl_weight: float,
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 0.0,
    ) -> None:
        """loss: "l1" or "mse", per pixel value."""
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.distance = nn.functional.l1_loss if loss == "l1" else nn.functional.mse_loss

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last layer, where gradients are compared (Esser et al. 2021, eq. 7)."""
        weight: Tensor = self.vae.decoder.conv_out.weight
        return weight

    def forward(self, images_B3HW: Tensor) -> VaeTerms:
        """Terms of a batch of images in [-1, 1], with noise drawn for the posterior."""
        posterior = self.vae.encode(images_B3HW).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        reconstruction = self.distance(decoded, images_B3HW)
        kl = posterior.kl().mean() / images_B3HW[0].numel()
        fidelity, perceptual = reconstruction, reconstruction.new_zeros(())
        if self.perceptual is not None:
            perceptual = self.perceptual(decoded, images_B3HW).mean()
            fidelity = reconstruction + self.perceptual_weight * perceptual
        loss = fidelity + self.kl_weight * kl
        return VaeTerms(loss, fidelity, reconstruction, perceptual, kl, decoded)
