"""int8 weights for the linear layers of a U-Net, through torchao.

torchao has no int8 convolution that runs everywhere: convolutions keep their dtype.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ldm.errors import UserError

__all__ = ["QUANTISATIONS", "linear_share", "quantise", "require_torchao"]

# Name → torchao's config. "int8": weights alone, widened for each product; "int8-dynamic": activations too,
# with a scale that is measured in each call.
QUANTISATIONS: Mapping[str, str] = {
    "int8": "Int8WeightOnlyConfig",
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
}


def quantise(model: nn.Module, how: str) -> None:
    """Quantise the linear layers in place. UserError for another ``how`` or where torchao is missing."""
    if how not in QUANTISATIONS:
        raise UserError(f"no quantisation {how!r}", allowed=", ".join(QUANTISATIONS))
    quantization = require_torchao()
    quantization.quantize_(model, getattr(quantization, QUANTISATIONS[how])())


def require_torchao() -> Any:
    """``torchao.quantization``. UserError where it is not installed."""
    try:
        from torchao import quantization
    except ImportError as error:
        raise UserError("torchao is not installed", do="pip install 'ray-ldm[quantise]'") from error
    return quantization


def linear_share(model: nn.Module) -> float:
    """Share of the parameters that `quantise` can reach."""
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    return linear / sum(parameter.numel() for parameter in model.parameters())
