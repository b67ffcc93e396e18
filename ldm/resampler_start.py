"""Start an AutoencoderKL as a resampler: box-filter reduction by f, smooth magnification by f.

From the usual random start, training must first discover that a latent can simply be a small copy
of the picture; GroupNorm, which removes the brightness of a channel group, makes that
hard to find. Here it is there before the first step. Measured in
docs/decisions/0001-vae-start.md.

The trunk (the path past all residual branches) carries R, G and B in its first channels:

    convolutions      identity on those channels, with a box or tent kernel where the size changes
    residual branches end in a zero convolution: they add nothing yet
    GroupNorm + SiLU  before each conv_out: made nearly linear. The channels that carry no colour
                      hold ±ANCHOR, so the statistics hardly depend on the picture, and an offset
                      of OPERATING_POINT puts SiLU where it is straight.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["start_as_resampler"]

COLOURS = 3
ANCHOR = 4.0
OPERATING_POINT = 4.0
# Standard deviation of every weight that is not part of the resampler, relative to He's.
NOISE = 0.5
# log σ² of the posterior at the start: noise of 5 % of a unit.
START_LOGVAR = -6.0

# What the trunk goes through between conv_in and conv_norm_out.
TRUNK = ("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")

# Downsample2D pads right and below only, so these four taps are exactly the 2×2 box.
BOX = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]) / 4
TENT = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
DELTA = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


@torch.no_grad()
def start_as_resampler(vae: "AutoencoderKL") -> None:
    """Set the weights in place. Needs at least 3 latent channels and ``norm_num_groups`` 1 to work well.

    Raises ValueError for fewer than 3 latent channels, or one resolution only.
    """
    if vae.config["latent_channels"] < COLOURS or len(vae.config["block_out_channels"]) < 2:
        raise ValueError("a resampler start needs 3 latent channels and 2 resolutions")
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith("conv_shortcut"):
            _carry(module, torch.ones(1, 1))
        elif name.endswith("downsamplers.0.conv"):
            _carry(module, BOX)
        elif name.endswith("upsamplers.0.conv"):
            _carry(module, TENT)
    _carry(vae.encoder.conv_in, DELTA)
    _carry(vae.decoder.conv_in, DELTA)
    _straighten(vae.encoder, _last_of_trunk(vae.encoder.down_blocks))
    _straighten(vae.decoder, _last_of_trunk(vae.decoder.up_blocks))
    if vae.quant_conv is not None:
        channels = vae.config["latent_channels"]
        vae.quant_conv.weight.copy_(torch.eye(2 * channels)[:, :, None, None])
        vae.quant_conv.bias.zero_()
        vae.quant_conv.bias[channels:] = START_LOGVAR
        vae.quant_conv.weight[channels:] *= 0.1
    if vae.post_quant_conv is not None:
        vae.post_quant_conv.weight.copy_(torch.eye(vae.config["latent_channels"])[:, :, None, None])
        vae.post_quant_conv.bias.zero_()


def _carry(conv: nn.Conv2d, kernel: Tensor) -> None:
    """Colour channels pass through ``kernel``; everything else starts small and random."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear").mul_(NOISE)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    conv.weight[:COLOURS] = 0
    for colour in range(min(COLOURS, conv.in_channels, conv.out_channels)):
        conv.weight[colour, colour] = kernel


def _last_of_trunk(blocks: nn.Module) -> nn.Conv2d:
    """The convolution after which the trunk's channels stay as they are, up to conv_norm_out.

    A block whose width does not change has no conv_shortcut; then it is the last change of size.
    """
    *_, last = (conv for name, conv in blocks.named_modules() if name.endswith(TRUNK))
    assert isinstance(last, nn.Conv2d)
    return last


def _straighten(half: nn.Module, last: nn.Conv2d) -> None:
    """Make conv_norm_out + SiLU nearly the identity on the colour channels, and conv_out undo the offset."""
    norm, out = half.conv_norm_out, half.conv_out
    assert isinstance(norm, nn.GroupNorm) and isinstance(out, nn.Conv2d) and last.bias is not None
    # As many channels at +ANCHOR as at -ANCHOR, or their mean would shift the colours.
    sign = torch.zeros(norm.num_channels)
    pairs = (norm.num_channels - COLOURS) // 2
    sign[COLOURS : COLOURS + pairs] = 1
    sign[COLOURS + pairs : COLOURS + 2 * pairs] = -1
    last.bias += ANCHOR * sign
    # Standard deviation that GroupNorm divides by: the anchors', up to the small share of the colours.
    scale = ANCHOR * float(sign.square().mean()) ** 0.5
    norm.weight.fill_(scale)
    norm.bias.copy_(OPERATING_POINT - ANCHOR * sign)
    _carry(out, DELTA)
    slope = 1.0 + OPERATING_POINT / (torch.e**OPERATING_POINT + 1)
    level = OPERATING_POINT / (1 + torch.e**-OPERATING_POINT)
    out.weight.div_(slope)
    out.bias -= out.weight.sum((1, 2, 3)) * level
