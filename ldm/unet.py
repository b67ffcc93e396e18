"""The denoiser: U-Net layouts from 1 M parameters to Stable Diffusion 2.1, in diffusers' format.

Shape suffixes: B images, C channels, H and W latent rows and columns.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.fingerprint import named_arrays, sha256_of

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["PRESETS", "Preset", "build", "fingerprint", "load", "predict", "save", "size_multiple"]

CLASS_NAME = "UNet2DConditionModel"
WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Preset:
    """A U-Net layout.

    ``num_params`` holds for 4 latent channels, no classes, and the preset's own
    ``cross_attention_dim`` (None: plain self-attention). ``attention_levels`` counts from the
    finest resolution, 0. ``head_dim`` is the width of one attention head.
    """

    num_params: int
    block_out_channels: tuple[int, ...]
    attention_levels: tuple[int, ...]
    layers_per_block: int
    head_dim: int
    norm_num_groups: int = 32
    cross_attention_dim: int | None = None
    upcast_attention: bool = False


PRESETS: Mapping[str, Preset] = {
    # Attention from the second level down: on an 8x8 latent that is 16 tokens and fewer.
    "tiny": Preset(1_065_700, (32, 64, 64), (1, 2), 1, head_dim=16, norm_num_groups=16),
    "small": Preset(4_242_884, (64, 128, 128), (1, 2), 1, head_dim=32),
    "base": Preset(16_931_716, (128, 256, 256), (1, 2), 1, head_dim=32),
    "large": Preset(61_549_924, (160, 320, 480), (1, 2), 2, head_dim=32),
    # Attention logits of the 2.1 weights overflow fp16: hence the upcast (as in its own config).
    "sd21": Preset(
        865_910_724,
        (320, 640, 1280, 1280),
        (0, 1, 2),
        2,
        head_dim=64,
        cross_attention_dim=1024,
        upcast_attention=True,
    ),
}


def build(
    preset: str,
    *,
    in_channels: int,
    num_classes: int | None,
    sample_size: int,
    cross_attention_dim: int | None = None,
    out_channels: int | None = None,
    num_noise_levels: int | None = None,
) -> UNet2DConditionModel:
    """A randomly initialised U-Net of a named layout, fp32, on torch's default device.

    ``num_classes``: without the null class, which is added as the last one; None for no class
    embedding. ``sample_size``: the latent's usual height and width. ``cross_attention_dim``:
    features of the embeddings to attend to; None means the preset's own, and where that is None too
    the U-Net takes no embeddings and has plain self-attention. ``out_channels``: ``in_channels``
    unless given (an upsampler's input carries the low-resolution latent as well). ``num_noise_levels``:
    of an upsampler, whose class labels are the levels of `ldm.upsampling`; it has no classes.

    Raises UserError for an unknown preset, ValueError for classes beside noise levels.
    """
    from diffusers import UNet2DConditionModel

    if preset not in PRESETS:
        raise UserError(f"no U-Net preset {preset!r}", allowed=", ".join(PRESETS))
    if num_classes is not None and num_noise_levels is not None:
        raise ValueError("a U-Net has one kind of class labels: classes or noise levels")
    layout = PRESETS[preset]
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=in_channels if out_channels is None else out_channels,
        block_out_channels=layout.block_out_channels,
        layers_per_block=layout.layers_per_block,
        norm_num_groups=layout.norm_num_groups,
        num_class_embeds=num_noise_levels if num_classes is None else num_classes + 1,
        upcast_attention=layout.upcast_attention,
        **_attention_config(layout, cross_attention_dim or layout.cross_attention_dim),
    )


def size_multiple(unet: UNet2DConditionModel) -> int:
    """What the latent's height and width must be multiples of.

    1 for most layouts, which fit their upsampling to the skip connections; diffusers'
    AttnUpBlock2D can only double.
    """
    config = unet.config
    if "AttnUpBlock2D" not in config["up_block_types"]:
        return 1
    return int(2 ** (len(config["block_out_channels"]) - 1))


def predict(unet: nn.Module, x_BCHW: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
    """Call the U-Net: the only place where that is done.

    ``unet``: a UNet2DConditionModel, or a wrapper that is called like one (DDP, torch.compile).
    ``timestep_B``: whole or real numbers, one for each image. Inputs are moved to the U-Net's device
    and dtype; the prediction (B, C_out, H, W) comes back in those of ``x_BCHW``.
    """
    weight = next(unet.parameters())
    condition = conditioning.to(weight.device, weight.dtype)
    (prediction_BCHW,) = unet(
        x_BCHW.to(weight.device, weight.dtype),
        timestep_B.to(weight.device),
        encoder_hidden_states=condition.embeddings,
        encoder_attention_mask=condition.mask,
        class_labels=condition.class_labels,
        return_dict=False,
    )
    assert isinstance(prediction_BCHW, Tensor)
    return prediction_BCHW.to(x_BCHW.device, x_BCHW.dtype)


def fingerprint(unet: UNet2DConditionModel) -> str:
    """`ldm.fingerprint.sha256_of` it: of what its config says other than the default, and its weights.

    So a key that a later diffusers adds changes nothing. ``sample_size`` decides nothing either.
    """
    parameters = inspect.signature(type(unet).__init__).parameters
    keys = parameters.keys() & unet.config.keys() - {"sample_size"}
    as_json = {key: json.loads(json.dumps([unet.config[key], parameters[key].default])) for key in keys}
    structure = {key: value for key, (value, default) in as_json.items() if value != default}
    return sha256_of(CLASS_NAME, structure, named_arrays(unet))


def save(unet: UNet2DConditionModel, folder: str | Path) -> None:
    """Write config and safetensors weights into ``folder``, which appears when it is whole.

    Raises UserError if ``folder`` already holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} is not empty", do="save the U-Net into a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # diffusers notes where a model was loaded from: this machine's path has no place in a checkpoint.
    unet.register_to_config(_name_or_path="")
    unet.save_pretrained(partial, safe_serialization=True)
    partial.rename(folder)


def load(path: str | Path) -> UNet2DConditionModel:
    """A U-Net from a diffusers folder, or a pipeline's folder with ``unet/`` in it; fp32, on the CPU.

    Only safetensors weights are read: a pickle can run code. Raises UserError if the folder, its
    config or its weights are missing, damaged, or do not fit each other.
    """
    from diffusers import UNet2DConditionModel

    folder = _find_folder(Path(path).expanduser())
    variant = _find_variant(folder)
    try:
        unet, report = UNet2DConditionModel.from_pretrained(
            folder,
            use_safetensors=True,
            variant=variant,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"cannot load the U-Net in {str(folder)!r}: {str(error).splitlines()[0]}") from error
    assert isinstance(unet, UNet2DConditionModel)
    # diffusers leaves weights that the file lacks at random values, and only logs it.
    wrong = [*report["missing_keys"], *report["unexpected_keys"]]
    if wrong:
        raise UserError(
            f"weights in {str(folder)!r} do not fit its config.json: {len(wrong)} such as {wrong[0]}"
        )
    return unet


def _attention_config(layout: Preset, cross_attention_dim: int | None) -> dict[str, object]:
    """Block types and head settings, for cross-attention or for plain self-attention."""
    prefix = "Attn" if cross_attention_dim is None else "CrossAttn"
    levels = range(len(layout.block_out_channels))
    down = tuple(f"{prefix if level in layout.attention_levels else ''}DownBlock2D" for level in levels)
    blocks = {
        "down_block_types": down,
        "up_block_types": tuple(b.replace("Down", "Up") for b in reversed(down)),
    }
    if cross_attention_dim is None:
        # The default mid block cross-attends; this one works without embeddings.
        return {**blocks, "mid_block_type": "UNetMidBlock2D", "attention_head_dim": layout.head_dim}
    return {
        **blocks,
        "cross_attention_dim": cross_attention_dim,
        "use_linear_projection": True,
        # In cross-attention blocks diffusers reads `attention_head_dim` as the *number* of heads.
        "attention_head_dim": tuple(channels // layout.head_dim for channels in layout.block_out_channels),
    }


def _find_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"no U-Net folder {str(path)!r}", do="give a folder in diffusers' format")
    for folder in (path, path / "unet"):
        config_file = folder / "config.json"
        if config_file.is_file():
            _check_class(config_file)
            return folder
    raise UserError(
        f"{str(path)!r} has neither config.json nor unet/config.json", do="give a diffusers folder"
    )


def _check_class(config_file: Path) -> None:
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise UserError(f"{str(config_file)!r} is not JSON: {error}") from error
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != CLASS_NAME:
        raise UserError(f"{str(config_file)!r} describes a {found}", allowed=CLASS_NAME)


def _find_variant(folder: Path) -> str | None:
    """The ``variant`` to ask diffusers for: None for plain files, "fp16" where there are only those."""
    for variant, suffix in ((None, ""), ("fp16", ".fp16")):
        names = (f"{WEIGHTS}{suffix}.safetensors", f"{WEIGHTS}.safetensors.index{suffix}.json")
        if any((folder / name).is_file() for name in names):
            return variant
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{str(folder)!r} has pickled weights only, which can run code",
            allowed=f"{WEIGHTS}.safetensors",
            do="save them again with safe_serialization=True",
        )
    raise UserError(f"{str(folder)!r} has no weights", allowed=f"{WEIGHTS}.safetensors")
