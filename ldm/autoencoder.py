"""The perceptual compressor: load or build a VAE, encode images to moments, decode latents to images.

Shape suffixes: B batch, H and W pixels, C latent channels, h = H / f, w = W / f.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm import vae_files
from ldm.errors import UserError
from ldm.fingerprint import named_arrays
from ldm.latents import Moments, Whitening
from ldm.resampler_start import start_as_resampler
from ldm.vae_files import default_names
from ldm.vae_identity import check_size, fingerprint_of, spatial_factor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from ldm.vae_files import DiffusersVae

__all__ = ["PRESETS", "Autoencoder", "Preset", "build", "default_names", "load"]


@dataclass(frozen=True)
class Preset:
    """A VAE layout in AutoencoderKL's terms; f = 2 ** (len(block_out_channels) - 1)."""

    block_out_channels: tuple[int, ...]
    latent_channels: int
    layers_per_block: int = 1
    # Several groups would each lose their mean, and with few channels that is the picture's brightness.
    norm_num_groups: int = 1
    # Without it the cost is linear in pixels; with it, 78 % of an 8192² decode is one attention.
    mid_block_add_attention: bool = False


PRESETS: Mapping[str, Preset] = {
    "f4": Preset((24, 64, 120), latent_channels=3),
    "f8": Preset((16, 32, 64, 120), latent_channels=4),
    "f16": Preset((16, 32, 64, 96, 96), latent_channels=16),
    "sd": Preset(
        (128, 256, 512, 512), 4, layers_per_block=2, norm_num_groups=32, mid_block_add_attention=True
    ),
}


class Autoencoder:
    """A diffusers autoencoder behind one interface, in evaluation mode and without gradients.

    Attributes: ``f`` pixels per latent along one side, ``channels`` of a latent, ``vae`` the
    diffusers module, ``whitening`` what the VAE's own config says of its latents' scale.
    """

    def __init__(self, vae: "DiffusersVae", name: str = "") -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.name = name or type(vae).__name__
        self.channels = int(vae.config["latent_channels"])
        self.f = spatial_factor(vae.config)

    def to(
        self, device: str | torch.device, dtype: torch.dtype = torch.float32, *, channels_last: bool = True
    ) -> "Autoencoder":
        """Move in place; returns itself."""
        # Not vae.to: diffusers warns of every cast, whether or not the model minds it.
        nn.Module.to(self.vae, device=device, dtype=dtype)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        nn.Module.to(self.vae, memory_format=memory_format)
        return self

    @torch.inference_mode()
    def encode(self, images_B3HW: Tensor) -> Moments:
        """Posterior moments (B, C, H/f, W/f), float32 on the VAE's device.

        images_B3HW: float in [-1, 1] on any device. UserError where H or W is no multiple of f.
        """
        height, width = images_B3HW.shape[-2:]
        self.check_size(height, width)
        output = self.vae.encode(images_B3HW.to(self.vae.device, self.vae.dtype))
        if hasattr(output, "latent_dist"):
            return self.moments_of(output.latent_dist.parameters)
        return self.moments_of(output.latents if hasattr(output, "latents") else output.latent)

    def moments_of(self, encoded_BChw: Tensor) -> Moments:
        """Of what the encoder computes: mean and log variance, or a latent where it has no posterior."""
        if encoded_BChw.shape[1] == self.channels:
            return Moments(encoded_BChw.float(), torch.zeros_like(encoded_BChw, dtype=torch.float32))
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        posterior = DiagonalGaussianDistribution(encoded_BChw)
        return Moments(posterior.mean.float(), posterior.std.float())

    @torch.inference_mode()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Images (B, 3, h·f, w·f), float32 clamped to [-1, 1]; latents in the VAE's own scale.

        UserError where the number of channels is not the VAE's.
        """
        self.check_latents(latents_BChw)
        images: Tensor = self.vae.decode(latents_BChw.to(self.vae.device, self.vae.dtype)).sample
        return images.float().clamp(-1, 1)

    def check_latents(self, latents_BChw: Tensor) -> None:
        """UserError unless the tensor's shape is that of this VAE's latents."""
        if latents_BChw.ndim != 4 or latents_BChw.shape[1] != self.channels or not latents_BChw.numel():
            raise UserError(
                f"a latent of shape {tuple(latents_BChw.shape)} is not one of VAE {self.name}",
                allowed=f"(batch, {self.channels}, height/{self.f}, width/{self.f})",
                do="decode it with the VAE that encoded it",
            )

    def check_size(self, height: int, width: int) -> None:
        """UserError unless both sides (pixels) are positive multiples of f."""
        check_size(self.name, self.f, height, width)

    @cached_property
    def whitening(self) -> Whitening:
        """Scale and shift from the VAE's own config, as diffusers' pipelines apply them."""
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            factor = config.get("scaling_factor", 1.0)
            return Whitening(tuple(mean), tuple(s / factor for s in std))
        shift = config.get("shift_factor") or 0.0
        return Whitening.from_scaling_factor(config.get("scaling_factor", 1.0), self.channels, shift)

    @cached_property
    def fingerprint(self) -> str:
        """Of class, structure and weights, in the dtype that they have now (`ldm.vae_identity`)."""
        return fingerprint_of(type(self.vae).__name__, self.vae.config, named_arrays(self.vae))


def build(preset: str) -> "AutoencoderKL":
    """An AutoencoderKL of a named layout, in fp32, ready to be trained.

    Weights are random, or where GroupNorm has one group those of a resampler (`ldm.resampler_start`).

    UserError for an unknown preset.
    """
    from diffusers import AutoencoderKL

    if preset not in PRESETS:
        raise UserError(f"no VAE preset {preset!r}", allowed=", ".join(PRESETS))
    layout = PRESETS[preset]
    num_blocks = len(layout.block_out_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
        block_out_channels=layout.block_out_channels,
        latent_channels=layout.latent_channels,
        layers_per_block=layout.layers_per_block,
        norm_num_groups=layout.norm_num_groups,
        mid_block_add_attention=layout.mid_block_add_attention,
        sample_size=256,
    )
    if layout.norm_num_groups == 1:
        start_as_resampler(vae)
    return vae


def load(source: str | Path) -> Autoencoder:
    """A VAE in fp32 on the CPU.

    source: a default model (see `default_names`), a diffusers folder (or a pipeline folder with
    ``vae/`` in it), an fsspec URL of one such as ``s3://bucket/vae``, or a hub id such as
    ``stabilityai/sd-vae-ft-mse``. Weights must be safetensors: a pickle can run code.

    UserError where there is no such VAE, it cannot be reached, or its files are damaged or do not
    fit each other.
    """
    name = str(source)
    return Autoencoder(vae_files.read(name), name)
