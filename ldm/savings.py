"""What diffusion on latents saves over diffusion on pixels: a ledger by f, computed on the meta device.

f = 1 are the pixels themselves; the channels of the other f are those of the default VAEs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm import autoencoder, unet
from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.meta_cost import Cost, count_params, meta_cost, weight_bytes

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["CHANNELS", "SIZE_MULTIPLE_PX", "LedgerRow", "check_size", "denoiser", "ledger", "step_cost"]

# f → channels of what the U-Net sees.
CHANNELS: Mapping[int, int] = {
    1: 3,
    **{f: autoencoder.PRESETS[f"f{f}"].latent_channels for f in (4, 8, 16)},
}
# At f = 16 a U-Net of three levels still halves the latent twice.
SIZE_MULTIPLE_PX = 64
TEXT_TOKENS = 77  # of CLIP, which Stable Diffusion's layout attends to


@dataclass(frozen=True)
class LedgerRow:
    """One step of one image. ``shape``: (C, h, w) of what the U-Net sees; weight_bytes in its dtype."""

    f: int
    shape: tuple[int, int, int]
    num_params: int
    weight_bytes: int
    cost: Cost

    @property
    def positions(self) -> int:
        return self.shape[1] * self.shape[2]

    @property
    def values(self) -> int:
        return self.shape[0] * self.positions

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + self.cost.activation_bytes

    @property
    def attention_share(self) -> float:
        """Of the FLOPs: that which grows with the square of the positions."""
        return self.cost.attention_flops / self.cost.flops


def check_size(size_px: int) -> None:
    """UserError unless every f of the ledger and its U-Nets divide the size."""
    if size_px < 1 or size_px % SIZE_MULTIPLE_PX:
        raise UserError(f"size {size_px} px", allowed=f"multiples of {SIZE_MULTIPLE_PX}")


def ledger(preset: str, size_px: int, dtype: torch.dtype = torch.float32) -> dict[int, LedgerRow]:
    """f → its row for the U-Net layout ``preset`` and square images. UserError for either."""
    check_size(size_px)
    return {f: _row(preset, size_px, f, dtype) for f in CHANNELS}


def _row(preset: str, size_px: int, f: int, dtype: torch.dtype) -> LedgerRow:
    shape = CHANNELS[f], size_px // f, size_px // f
    model = denoiser(preset, CHANNELS[f], dtype)
    return LedgerRow(f, shape, count_params(model), weight_bytes(model), step_cost(model, shape))


def denoiser(preset: str, channels: int, dtype: torch.dtype = torch.float32) -> "UNet2DConditionModel":
    """The U-Net of a layout on the meta device, in evaluation mode."""
    with torch.device("meta"):
        built = unet.build(preset, in_channels=channels, num_classes=None, sample_size=64)
    # Not built.to: diffusers warns of casts.
    nn.Module.to(built, dtype=dtype)
    return built.eval()


def step_cost(model: "UNet2DConditionModel", shape_Chw: tuple[int, int, int], batch: int = 1) -> Cost:
    """Of one call of a U-Net on the meta device, its input included."""
    dtype, width = model.dtype, model.config["cross_attention_dim"]
    attends_to_text = any("CrossAttn" in name for name in model.config["down_block_types"])

    def step() -> Tensor:
        x_BChw = torch.empty(batch, *shape_Chw, dtype=dtype)
        text_BLD = torch.empty(batch, TEXT_TOKENS, width, dtype=dtype) if attends_to_text else None
        return unet.predict(model, x_BChw, torch.empty(batch), Conditioning(embeddings=text_BLD))

    return meta_cost(step)
