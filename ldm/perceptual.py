"""Perceptual distance of two images: LPIPS (Zhang et al. 2018), with whichever weights are at hand.

There is one formula and there are several feature networks. Distances by different ones are on
different scales: a figure is only comparable with another of the same `Perceptual.fingerprint`.

| source        | network                                | weights                                         |
|---------------|----------------------------------------|-------------------------------------------------|
| ``lpips-vgg`` | VGG-16, trained on ImageNet            | torchvision's server, 528 MB once               |
| ``lpips-alex``| AlexNet, trained on ImageNet           | torchvision's server, 233 MB once               |
| a folder      | that of the torchvision file in it     | ``vgg16*`` or ``alexnet*``, .pth or safetensors |
| ``stlpips``   | shift-tolerant AlexNet, on ImageNet    | the package of extra ``perceptual``, offline    |
| ``random``    | five random convolutions               | none: seeded                                    |
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm import feature_networks, perceptual_weights
from ldm.errors import UserError
from ldm.perceptual_weights import Weights

__all__ = ["SOURCES", "Perceptual", "load_perceptual"]

SOURCES = ("lpips-vgg", "lpips-alex", "stlpips", "random")

# name → layout, and the smallest side that leaves features at every stage
NETWORKS: Mapping[str, tuple[Callable[[], list[nn.Sequential]], int]] = {
    "lpips-vgg": (feature_networks.vgg16, 16),
    "lpips-alex": (feature_networks.alexnet, 31),
    "stlpips": (feature_networks.shift_tolerant_alexnet, 21),
    "random-features": (feature_networks.random_network, 16),
}
# Of ImageNet's colours, for images in [-1, 1]: LPIPS, "scaling layer".
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Perceptual(nn.Module):
    """Distance of two images by the features of a frozen network. Gradients reach both images.

    Attributes: ``name`` of the feature network (a key of `NETWORKS`), ``fingerprint`` sha256 over
    name and weights, ``min_px`` the smallest side of an image.
    """

    def __init__(self, name: str, stages: Sequence[nn.Sequential], weights: Weights) -> None:
        """UserError where the weights do not fit the network."""
        super().__init__()
        self.name, self.min_px = name, NETWORKS[name][1]
        _put_in_place(name, stages, weights)
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ParameterList(weights.heads)
        self.requires_grad_(False).eval()
        self.fingerprint = _fingerprint(name, (*weights.convolutions, *weights.heads))

    def forward(self, a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
        """Distances (B,) float32, 0 for equal images; images float in [-1, 1] of one size.

        Zhang et al. 2018, eq. 1: features of unit length in every place, squared difference, channels
        weighted by the stage's head, mean over places, sum over stages. UserError below ``min_px``.
        """
        return self.between(self.features(a_B3HW), self.features(b_B3HW))

    def features(self, image_B3HW: Tensor) -> list[Tensor]:
        """What `between` compares: of each stage (B, C, h, w), of unit length in every place."""
        self.check_size(*image_B3HW.shape[-2:])
        x, features = self._scaled(image_B3HW), []
        for stage in self.stages:
            x = stage(x)
            features.append(_unit_length(x))
        return features

    def between(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Distances (B,) of images by their `features`, for images that are compared more than once."""
        distance_B = torch.zeros(len(a[0]), device=a[0].device)
        for a_BChw, b_BChw, head_C in zip(a, b, self.heads, strict=True):
            distance_B = distance_B + (a_BChw - b_BChw).square().mean((2, 3)) @ head_C
        return distance_B

    def check_size(self, height: int, width: int) -> None:
        """UserError where an image of ``height`` × ``width`` px is too small for the network."""
        if min(height, width) < self.min_px:
            raise UserError(
                f"an image of {width}×{height} pixels is too small for {self.name}",
                allowed=f"sides of {self.min_px} pixels or more",
            )

    @staticmethod
    def _scaled(image_B3HW: Tensor) -> Tensor:
        image = image_B3HW.float()
        shift, scale = (image.new_tensor(rgb).view(1, 3, 1, 1) for rgb in (SHIFT, SCALE))
        return (image - shift) / scale


def load_perceptual(source: str) -> Perceptual:
    """A perceptual distance on the CPU, by one of `SOURCES` or a folder with a torchvision file.

    The global random state is left as it is. UserError where the weights cannot be had.
    """
    if source == "random":
        stages = feature_networks.random_network()
        return Perceptual("random-features", stages, perceptual_weights.random_features(stages))
    name, weights = _named_weights(source)
    return Perceptual(name, NETWORKS[name][0](), weights)


def _named_weights(source: str) -> tuple[str, Weights]:
    if source == "stlpips":
        return source, perceptual_weights.shift_tolerant()
    if source in ("lpips-vgg", "lpips-alex"):
        return source, perceptual_weights.lpips(source)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"no perceptual distance {source!r}", allowed=f"{', '.join(SOURCES)}, or a folder")
    name = perceptual_weights.in_folder(folder)
    return name, perceptual_weights.lpips(name, folder)


def _put_in_place(name: str, stages: Sequence[nn.Sequential], weights: Weights) -> None:
    places = [
        (layer, part)
        for stage in stages
        for layer in stage
        if isinstance(layer, nn.Conv2d)
        for part in ("weight", "bias")
    ]
    wanted = [tuple(getattr(layer, part).shape) for layer, part in places]
    if wanted != [tuple(tensor.shape) for tensor in weights.convolutions]:
        raise UserError(f"the weights do not fit {name}", do="give the file of torchvision, unchanged")
    for (layer, part), tensor in zip(places, weights.convolutions, strict=True):
        setattr(layer, part, nn.Parameter(tensor.float()))


def _unit_length(features_BChw: Tensor) -> Tensor:
    # Within the root: where all channels are 0 its derivative would be infinite, and the gradient NaN.
    return features_BChw / (features_BChw.square().sum(1, keepdim=True) + 1e-8).sqrt()


def _fingerprint(name: str, tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(name.encode())
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
