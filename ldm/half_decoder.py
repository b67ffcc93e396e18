"""A VAE that decodes in half precision, and what overflows there again in fp32."""

import torch
from torch import Tensor, nn

from ldm.autoencoder import Autoencoder
from ldm.errors import UserError

__all__ = ["HalfDecoder"]


class HalfDecoder:
    """Holds the weights in half precision only; they are widened for as long as a decode is repeated.

    The idea is diffusers' ``force_upcast``, but paid for by those pictures that need it. ``num_repeated``:
    pictures so far. UserError where a weight itself is too large for ``dtype``.
    """

    def __init__(self, autoencoder: Autoencoder, dtype: torch.dtype = torch.float16) -> None:
        autoencoder.to(autoencoder.vae.device, dtype)
        if not all(bool(weight.isfinite().all()) for weight in autoencoder.vae.parameters()):
            raise UserError(
                f"weights of VAE {autoencoder.name} overflow {str(dtype).removeprefix('torch.')}",
                allowed="bfloat16 or float32",
            )
        self.autoencoder, self.dtype, self.num_repeated = autoencoder, dtype, 0

    @torch.inference_mode()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """As `Autoencoder.decode`, whose clamp would make white of an overflow: hence a look before it."""
        images = self._decode(latents_BChw)
        overflowed_B = ~images.isfinite().flatten(1).all(1)
        if overflowed_B.any():
            self.num_repeated += int(overflowed_B.sum())
            images[overflowed_B] = self._decode_wide(latents_BChw[overflowed_B.to(latents_BChw.device)])
        return images.clamp(-1, 1)

    def _decode_wide(self, latents_BChw: Tensor) -> Tensor:
        vae = self.autoencoder.vae
        nn.Module.to(vae, dtype=torch.float32)
        try:
            return self._decode(latents_BChw)
        finally:
            nn.Module.to(vae, dtype=self.dtype)

    def _decode(self, latents_BChw: Tensor) -> Tensor:
        vae = self.autoencoder.vae
        images: Tensor = vae.decode(latents_BChw.to(vae.device, vae.dtype)).sample
        return images.float()
