"""Feature reuse across denoising steps: run a U-Net's deep blocks at some steps only (DeepCache).

From one step to the next the deep features of a U-Net hardly change (Ma et al. 2023, arXiv 2312.00858, section
3.2). So a row may take its own of an earlier step, and run only what is above the cut:

    conv_in ─ kept layers of the first down block ──────────── as many layers of the last up block, + 1 ─ out
                           └─ the deep blocks ─── deep feature ──┘

Shape suffixes: N rows of a call, F those that run everything; C channels, H and W latent rows and columns;
T features of the time embedding; L tokens, D features of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.errors import UserError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["check_cut", "predict_reusing"]

CUT_DOWN = ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D")
CUT_UP = ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D")


def check_cut(unet: UNet2DConditionModel, kept_layers: int = 0) -> None:
    """Raises UserError if this U-Net cannot be cut so that ``kept_layers`` of its first down block stay."""
    ends = type(unet.down_blocks[0]).__name__, type(unet.up_blocks[-1]).__name__
    if ends[0] not in CUT_DOWN or ends[1] not in CUT_UP:
        raise UserError(
            f"features of a U-Net that begins with {ends[0]} and ends with {ends[1]} cannot be reused",
            allowed=", ".join(CUT_DOWN + CUT_UP),
        )
    num_layers = len(unet.down_blocks[0].resnets)
    if not 0 <= kept_layers <= num_layers:
        raise UserError(f"{kept_layers} kept layers", allowed=f"0 to {num_layers} for this U-Net")


def predict_reusing(
    unet: UNet2DConditionModel,
    x_NCHW: Tensor,
    timestep_N: Tensor,
    conditioning: Conditioning,
    deep_N: Sequence[Tensor | None],
    *,
    kept_layers: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """`ldm.unet.predict`, but rows with a deep feature take it in place of running the deep blocks.

    ``deep_N``: for each row None, or what an earlier call of the same U-Net, size and ``kept_layers`` gave
    for it. ``kept_layers``: of the first down block, that every row runs.

    The prediction (N, C_out, H, W), in the device and dtype of ``x_NCHW``, and the deep feature (C, H, W) of
    every row, in those of the U-Net: as given, or fresh and with memory of its own. Without a feature given
    the prediction is that of `ldm.unet.predict`, bit for bit. Raises UserError as `check_cut` does,
    ValueError if there is not one entry for each row.
    """
    check_cut(unet, kept_layers)
    if len(deep_N) != len(x_NCHW):
        raise ValueError(f"{len(deep_N)} deep features for {len(x_NCHW)} rows")
    weight = next(unet.parameters())
    sample_NCHW = x_NCHW.to(weight.device, weight.dtype)
    context = _context(unet, sample_NCHW, timestep_N, conditioning)
    skips = _shallow_down(unet, sample_NCHW, context, kept_layers)
    deep_NCHW, features = _deep_of_all(unet, skips[-1], context, deep_N, kept_layers)
    prediction_NCHW = _shallow_up(unet, deep_NCHW, skips, context)
    return prediction_NCHW.to(x_NCHW.device, x_NCHW.dtype), features


@dataclass(frozen=True, eq=False)
class _Context:
    """What blocks are given beside their input; ``bias``: added to attention logits, for the mask."""

    time_NT: Tensor
    embeddings_NLD: Tensor | None
    bias_N1L: Tensor | None

    def select(self, index_F: Tensor) -> _Context:
        return _Context(
            self.time_NT[index_F],
            None if self.embeddings_NLD is None else self.embeddings_NLD[index_F],
            None if self.bias_N1L is None else self.bias_N1L[index_F],
        )

    def attended(self, block: nn.Module) -> dict[str, Tensor | None]:
        """The arguments that only a block with cross-attention takes."""
        if not getattr(block, "has_cross_attention", False):
            return {}
        return {"encoder_hidden_states": self.embeddings_NLD, "encoder_attention_mask": self.bias_N1L}


def _context(
    unet: UNet2DConditionModel, sample_NCHW: Tensor, timestep_N: Tensor, conditioning: Conditioning
) -> _Context:
    """As at the beginning of diffusers' ``UNet2DConditionModel.forward``."""
    condition = conditioning.to(sample_NCHW.device, sample_NCHW.dtype)
    time_NT = unet.time_embedding(unet.get_time_embed(sample_NCHW, timestep_N.to(sample_NCHW.device)))
    class_NT = unet.get_class_embed(sample_NCHW, condition.class_labels)
    if class_NT is not None:
        concatenated = unet.config["class_embeddings_concat"]
        time_NT = torch.cat([time_NT, class_NT], dim=-1) if concatenated else time_NT + class_NT
    augmented_NT = unet.get_aug_embed(time_NT, condition.embeddings, {})
    if augmented_NT is not None:
        time_NT = time_NT + augmented_NT
    if unet.time_embed_act is not None:
        time_NT = unet.time_embed_act(time_NT)
    embeddings_NLD = unet.process_encoder_hidden_states(condition.embeddings, {})
    mask = condition.mask
    bias_N1L = None if mask is None else ((1 - mask.to(sample_NCHW.dtype)) * -10000.0).unsqueeze(1)
    return _Context(time_NT, embeddings_NLD, bias_N1L)


def _shallow_down(
    unet: UNet2DConditionModel, sample_NCHW: Tensor, context: _Context, kept_layers: int
) -> list[Tensor]:
    """The skip connections above the cut; the deep blocks go on from the last."""
    if unet.config["center_input_sample"]:
        sample_NCHW = 2 * sample_NCHW - 1.0
    skips = [unet.conv_in(sample_NCHW)]
    for index in range(kept_layers):
        skips.append(_layer(unet.down_blocks[0], index, skips[-1], context))
    return skips


def _deep_of_all(
    unet: UNet2DConditionModel,
    x_NCHW: Tensor,
    context: _Context,
    deep_N: Sequence[Tensor | None],
    kept_layers: int,
) -> tuple[Tensor, list[Tensor]]:
    """The deep features as a batch, and row by row."""
    given = [deep_CHW for deep_CHW in deep_N if deep_CHW is not None]
    if not given:
        deep_NCHW = _deep(unet, x_NCHW, context, kept_layers)
        return deep_NCHW, _own_memory(deep_NCHW)
    if len(given) == len(deep_N):
        return torch.stack(given), given
    fresh = [row for row, deep_CHW in enumerate(deep_N) if deep_CHW is None]
    index_F = torch.tensor(fresh, device=x_NCHW.device)
    computed = iter(_own_memory(_deep(unet, x_NCHW[index_F], context.select(index_F), kept_layers)))
    features = [next(computed) if deep_CHW is None else deep_CHW for deep_CHW in deep_N]
    return torch.stack(features), features


def _deep(unet: UNet2DConditionModel, x_FCHW: Tensor, context: _Context, kept_layers: int) -> Tensor:
    """All below the cut."""
    skips = [x_FCHW]
    x_FCHW = _down(unet, skips, context, kept_layers)
    if unet.mid_block is not None:
        x_FCHW = unet.mid_block(x_FCHW, context.time_NT, **context.attended(unet.mid_block))
    return _up(unet, x_FCHW, skips, context)


def _down(unet: UNet2DConditionModel, skips: list[Tensor], context: _Context, kept_layers: int) -> Tensor:
    """Adds to ``skips``."""
    first, *others = unet.down_blocks
    for index in range(kept_layers, len(first.resnets)):
        skips.append(_layer(first, index, skips[-1], context))
    for downsampler in first.downsamplers or ():
        skips.append(downsampler(skips[-1]))
    for block in others:
        _, outputs = block(skips[-1], context.time_NT, **context.attended(block))
        skips += outputs
    return skips[-1]


def _up(unet: UNet2DConditionModel, x_FCHW: Tensor, skips: list[Tensor], context: _Context) -> Tensor:
    """Takes from ``skips``, the last first, all but the first, which is above the cut."""
    *others, last = unet.up_blocks
    odd = any(size % 2**unet.num_upsamplers for size in skips[0].shape[-2:])
    for block in others:
        taken = [skips.pop() for _ in block.resnets][::-1]
        x_FCHW = block(
            x_FCHW,
            tuple(taken),
            temb=context.time_NT,
            upsample_size=skips[-1].shape[2:] if odd else None,
            **context.attended(block),
        )
    for index, skip in enumerate(skips[:0:-1]):
        x_FCHW = _layer(last, index, torch.cat([x_FCHW, skip], dim=1), context)
    return x_FCHW


def _shallow_up(
    unet: UNet2DConditionModel, x_NCHW: Tensor, skips: Sequence[Tensor], context: _Context
) -> Tensor:
    last = unet.up_blocks[-1]
    for index, skip in enumerate(reversed(skips), start=len(last.resnets) - len(skips)):
        x_NCHW = _layer(last, index, torch.cat([x_NCHW, skip], dim=1), context)
    if unet.conv_norm_out is not None:
        x_NCHW = unet.conv_act(unet.conv_norm_out(x_NCHW))
    prediction_NCHW: Tensor = unet.conv_out(x_NCHW)
    return prediction_NCHW


def _layer(block: Any, index: int, x_NCHW: Tensor, context: _Context) -> Tensor:
    """One resnet of a block, and the attention after it where there is one."""
    hidden_NCHW: Tensor = block.resnets[index](x_NCHW, context.time_NT)
    if not hasattr(block, "attentions"):
        return hidden_NCHW
    attended = context.attended(block)
    if not attended:
        hidden_NCHW = block.attentions[index](hidden_NCHW)
        return hidden_NCHW
    (hidden_NCHW,) = block.attentions[index](hidden_NCHW, **attended, return_dict=False)
    return hidden_NCHW


def _own_memory(deep_FCHW: Tensor) -> list[Tensor]:
    """Rows that can be kept without keeping their batch."""
    return [deep_CHW.clone() for deep_CHW in deep_FCHW]
