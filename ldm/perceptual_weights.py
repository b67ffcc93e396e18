"""Where the weights of a perceptual distance come from: a package, torchvision's server, a folder.

A set of weights is the convolutions' weights and biases in the order of the network, and one
head per stage: how much each channel counts. Files are read without running any code in them.
"""

import pickle
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from sys import stderr

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.extractor_weights import read

__all__ = ["Weights", "in_folder", "lpips", "random_features", "shift_tolerant"]

# (file name in torchvision's form without its hash, name of the heads in torchmetrics)
BACKBONES: Mapping[str, tuple[str, str]] = {"lpips-vgg": ("vgg16", "vgg"), "lpips-alex": ("alexnet", "alex")}
OFFLINE = "give a folder with the file, or use stlpips (pip install 'ray-ldm[perceptual]') or random"
# torchvision calls a convolution features.0.weight, the stlpips package net.slice1.0.weight; both
# count the layers of the whole network.
CONVOLUTION = re.compile(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)")
HEAD = re.compile(r"lin(\d)\.model\.1\.weight")


@dataclass(frozen=True)
class Weights:
    """convolutions: weight, bias, weight, … in the order of the network; heads: one (C,) per stage."""

    convolutions: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]


def lpips(name: str, folder: Path | None = None) -> Weights:
    """Weights of "lpips-vgg" or "lpips-alex": heads from torchmetrics, the rest from torchvision.

    folder: where torchvision's file lies; without it the file is downloaded once, and checked
    against the hash in its name. UserError where it cannot be had or is damaged.
    """
    backbone, head = BACKBONES[name]
    tensors = read(_file_of(backbone, folder)) if folder else _download(backbone)
    lpips_models = _package_folder("torchmetrics") / "functional/image/lpips_models"
    return Weights(_convolutions(tensors), _heads(read(lpips_models / f"{head}.pth")))


def in_folder(folder: Path) -> str:
    """Which of "lpips-vgg" and "lpips-alex" a folder has the weights of; UserError unless it is one."""
    found = [name for name, (backbone, _) in BACKBONES.items() if _files_of(backbone, folder)]
    if len(found) != 1:
        raise UserError(
            f"{folder} has the weights of {' and '.join(found) or 'no feature network'}",
            allowed="one of " + ", ".join(f"{b}*.pth or {b}*.safetensors" for b, _ in BACKBONES.values()),
        )
    return found[0]


def shift_tolerant() -> Weights:
    """Weights of AlexNet and heads from the package ``stlpips_pytorch``; UserError where it is missing.

    Of the package only the file of weights is read: its code wants IPython and torchsummary.
    """
    if find_spec("stlpips_pytorch") is None:
        raise UserError(
            "the weights of stlpips are not installed", do="pip install 'ray-ldm[perceptual]', or use random"
        )
    tensors = read(_package_folder("stlpips_pytorch") / "weights/vST0.0/alex_shift_tolerant.pth")
    return Weights(_convolutions(tensors), _heads(tensors))


def random_features(stages: list[nn.Sequential], seed: int = 0) -> Weights:
    """He-normal convolutions without bias for ``stages``, and heads that take the mean over stages."""
    generator = torch.Generator().manual_seed(seed)
    convolutions: list[Tensor] = []
    widths = []
    for stage in stages:
        for conv in (layer for layer in stage if isinstance(layer, nn.Conv2d)):
            gain = (2 / conv.weight[0].numel()) ** 0.5
            convolutions.append(torch.randn(conv.weight.shape, generator=generator) * gain)
            convolutions.append(torch.zeros(conv.out_channels))
            width = conv.out_channels
        widths.append(width)
    return Weights(tuple(convolutions), tuple(torch.full((w,), 1 / len(stages)) for w in widths))


def _download(backbone: str) -> dict[str, Tensor]:
    from torchvision import models  # type: ignore[import-untyped]

    weights = {"vgg16": models.VGG16_Weights, "alexnet": models.AlexNet_Weights}[backbone].IMAGENET1K_V1
    try:
        # torch.hub says what it downloads on stdout, where --json has its one line.
        with redirect_stdout(stderr):
            return torch.hub.load_state_dict_from_url(
                weights.url, map_location="cpu", check_hash=True, weights_only=True
            )
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot download {weights.url}: {error}", do=OFFLINE) from error


def _files_of(backbone: str, folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.glob(f"{backbone}*") if path.suffix in (".pth", ".pt", ".safetensors")
    )


def _file_of(backbone: str, folder: Path) -> Path:
    files = _files_of(backbone, folder)
    if len(files) != 1:
        raise UserError(f"{folder} has {len(files)} files of {backbone}", allowed="1")
    return files[0]


def _package_folder(package: str) -> Path:
    """Of an installed package, without importing it."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _convolutions(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    found = {
        (int(m[1]), m[2] == "bias"): tensors[key] for key in tensors if (m := CONVOLUTION.fullmatch(key))
    }
    return tuple(found[place] for place in sorted(found))


def _heads(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    found = {int(m[1]): tensors[key].flatten() for key in tensors if (m := HEAD.fullmatch(key))}
    return tuple(found[stage] for stage in sorted(found))
