"""LoRA: a U-Net whose weights stay as they are, with a low-rank update beside some of them (Hu et al. 2021).

W x + (alpha / rank) B A x, with A (rank, in) and B (out, rank); B is 0 at first: training begins at the base.
The layers are peft's, and the file is the one that diffusers' ``load_lora_adapter`` reads.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import nn

from ldm.errors import UserError
from ldm.seeds import keyed_seed

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["LoraTraining", "add_adapter", "has_adapter", "merge_adapter", "put_adapter", "save_adapter"]


class LoraTraining(BaseModel):
    """The update that is trained in place of the U-Net's own weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: PositiveInt = Field(16, description="of the update of each weight")
    alpha: PositiveFloat | None = Field(
        None, description="the update is scaled by alpha / rank; default: the rank"
    )
    dropout: float = Field(0.0, ge=0, le=1, description="of the update's input")
    target_modules: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="last parts of the names of the layers that get one; default: attention's projections",
    )


def add_adapter(unet: "UNet2DConditionModel", lora: LoraTraining, seed: int) -> None:
    """Freeze ``unet`` and put an adapter into it, whose A is drawn from ``seed`` alone and whose B is 0.

    Raises UserError where peft is not installed, or a target names no linear or convolution layer.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("LoRA needs the package peft", do="pip install 'ray-ldm[lora]'") from error
    _check_targets(unet, lora.target_modules)
    unet.requires_grad_(False)
    adapter = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed("lora", seed) % 2**63)
        unet.add_adapter(adapter)


def has_adapter(unet: "UNet2DConditionModel") -> bool:
    """Whether `add_adapter` was called on it, and `merge_adapter` was not."""
    return bool(getattr(unet, "peft_config", None))


def merge_adapter(unet: "UNet2DConditionModel") -> None:
    """Add the update to the weights: afterwards it is a U-Net like any other, with the same predictions."""
    unet.fuse_lora()
    unet.unload_lora()


def save_adapter(unet: "UNet2DConditionModel", folder: Path) -> None:
    """Write the adapter as safetensors into ``folder``, which appears when it is whole.

    ``base.load_lora_adapter(folder, prefix=None, use_safetensors=True)`` of diffusers puts it onto the base.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    unet.save_lora_adapter(partial)
    partial.rename(folder)


def put_adapter(unet: "UNet2DConditionModel", folder: Path) -> None:
    """Add an update, as `save_adapter` wrote it, to the weights.

    UserError where it is missing, damaged or of another U-Net.
    """
    if not folder.is_dir():
        raise UserError(f"no adapter folder {str(folder)!r}", do="give the lora/ folder of a checkpoint")
    try:
        unet.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot put the adapter in {str(folder)!r} onto the U-Net: {reason}") from error
    if not has_adapter(unet):
        raise UserError(f"the adapter in {str(folder)!r} has nothing for this U-Net")
    merge_adapter(unet)


def _check_targets(unet: nn.Module, targets: tuple[str, ...]) -> None:
    # peft is content if one of several targets is found.
    wrong = [target for target in targets if not _are_layers(_matches(unet, target))]
    if wrong:
        raise UserError(
            f"LoRA's target_modules {', '.join(wrong)}: no linear or convolution layers of the U-Net",
            do="give last parts of layers' names, such as to_q,to_out.0",
        )


def _matches(unet: nn.Module, target: str) -> list[nn.Module]:
    """By peft's rule: the name, or whole parts at its end."""
    return [module for name, module in unet.named_modules() if f".{name}".endswith(f".{target}")]


def _are_layers(modules: list[nn.Module]) -> bool:
    return bool(modules) and all(isinstance(module, nn.Linear | nn.Conv2d) for module in modules)
