"""The convolutional networks whose features `ldm.perceptual` compares, as stages without weights.

Each function returns the stages in order: stage i takes the output of stage i - 1, and what every
stage returns is one layer of features. Convolutions lie on torch's meta device, so that no random
numbers are drawn and no memory is taken for weights that are about to be put in their place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Blur", "alexnet", "random_network", "shift_tolerant_alexnet", "vgg16"]


class Blur(nn.Module):
    """Binomial 3×3 filter, then every second pixel, after a reflected border of 2 (Zhang 2019)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H/2 + 1, W/2 + 1), rounded down; H, W > 2."""
        channels = x_BCHW.shape[1]
        row = x_BCHW.new_tensor([0.25, 0.5, 0.25])
        kernel = torch.outer(row, row).expand(channels, 1, 3, 3)
        padded = nn.functional.pad(x_BCHW, (2, 2, 2, 2), mode="reflect")
        return nn.functional.conv2d(padded, kernel, stride=2, groups=channels)


def vgg16() -> list[nn.Sequential]:
    """VGG-16 (Simonyan & Zisserman 2015) up to relu5_3, cut before each pooling; sides of 16 px or more."""
    widths = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
    return _pooled_blocks(widths)


def random_network() -> list[nn.Sequential]:
    """VGG's form with one convolution a stage, small enough to be used with random weights; 16 px or more."""
    return _pooled_blocks(((32,), (64,), (128,), (128,), (128,)))


def alexnet() -> list[nn.Sequential]:
    """AlexNet's convolutions as torchvision has them (Krizhevsky 2014); sides of 31 px or more."""
    first, second, *rest = _alexnet_convolutions(stride=4)
    return [
        nn.Sequential(first, nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 2), second, nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 2), rest[0], nn.ReLU()),
        *(nn.Sequential(conv, nn.ReLU()) for conv in rest[1:]),
    ]


def shift_tolerant_alexnet() -> list[nn.Sequential]:
    """AlexNet with blurred reductions (Ghildyal & Liu 2022, "conv1 stride 1, blur after"); 21 px or more."""
    first, second, *rest = _alexnet_convolutions(stride=1)
    return [
        nn.Sequential(first, Blur(), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 1), Blur(), second, nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 1), Blur(), rest[0], nn.ReLU()),
        *(nn.Sequential(conv, nn.ReLU()) for conv in rest[1:]),
    ]


def _pooled_blocks(widths: Sequence[Sequence[int]]) -> list[nn.Sequential]:
    stages, channels = [], 3
    for index, block in enumerate(widths):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
        for width in block:
            layers += [_convolution(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        stages.append(nn.Sequential(*layers))
    return stages


def _alexnet_convolutions(stride: int) -> list[nn.Conv2d]:
    return [
        _convolution(3, 64, 11, stride=stride, padding=2),
        _convolution(64, 192, 5, padding=2),
        _convolution(192, 384, 3, padding=1),
        _convolution(384, 256, 3, padding=1),
        _convolution(256, 256, 3, padding=1),
    ]


def _convolution(channels: int, width: int, side: int, *, stride: int = 1, padding: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, side, stride, padding, device="meta")
